"""How large an input may be: files of settings, their nesting, what they come to once aliases are followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from alignlab.errors import AlignlabError, ConfigError

MAX_SETTINGS_BYTES = 2**20
MAX_NODES = 20_000
"""Values and keys of a YAML text, each counted as often as aliases repeat it."""
MAX_DEPTH = 50
MAX_JSON_BYTES = 2**26
"""Of a JSON file that describes a model. The largest, an index of tensors, has a few MiB."""
LONGEST_SHOWN_INTEGER = 40
_FIX = "copy it again, or write it again"


def read_limited(path: Path, limit: int, kind: type[AlignlabError]) -> str:
    """Return the text of a file.

    Args:
        limit: bytes that it may have.
        kind: of the errors.

    Raises:
        kind: it is longer, no text in UTF-8, or cannot be read.
    """
    try:
        if path.is_fifo():
            raise kind(f"{path} must be a file, and is a pipe, whose end may never come; write it to a file")
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except OSError as error:
        raise kind(f"{path} cannot be read: {error}; correct the path, or its permissions") from error
    if len(data) > limit:
        raise kind(f"{path} must have at most {limit} bytes, and has more; correct the path, or make the file smaller")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise kind(f"{path} must be text in UTF-8, and is not: {error}; convert it") from None


def read_json_object(path: Path, kind: type[AlignlabError]) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        kind: of the errors.

    Raises:
        kind: it is larger than `MAX_JSON_BYTES`, nested too deeply, or holds something else.
    """
    text = read_limited(path, MAX_JSON_BYTES, kind)
    try:
        value = json.loads(text)
    except RecursionError:
        raise kind(f"{path} cannot be read: it is nested too deeply; {_FIX}") from None
    except ValueError as error:  # a number of thousands of digits, too
        raise kind(f"{path} cannot be read: it is no JSON: {error}; {_FIX}") from None
    if not isinstance(value, dict):
        raise kind(f"{path} cannot be read: it must hold one object, and holds {type(value).__name__}; {_FIX}")
    return value


class LimitedLoader(yaml.SafeLoader):
    """YAML that is no larger than a file of settings can be, and whose errors are YAML's own, with the line."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_nodes = self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose the next value, within the limits."""
        mark = self.peek_event().start_mark
        self._num_nodes += 1
        self._depth += 1
        if self._num_nodes > MAX_NODES:
            raise _problem(f"there are more than {MAX_NODES} values and keys", mark)
        if self._depth > MAX_DEPTH:
            raise _problem(f"it is nested deeper than {MAX_DEPTH} levels", mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """Compose the only document, and count what it comes to once aliases are followed."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _expanded(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; what its type cannot hold is an error of YAML's."""
        try:
            value = super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # of int(), of a date that there is not, of a key that cannot be looked up
            text = str(node.value)[:LONGEST_SHOWN_INTEGER] if isinstance(node, yaml.ScalarNode) else "it"
            kind = node.tag.rpartition(":")[2]
            raise _problem(f"{text!r} is no {kind} ({type(error).__name__})", node.start_mark) from None
        if isinstance(value, int) and abs(value) >= 10**LONGEST_SHOWN_INTEGER:
            raise _problem(f"a whole number has more than {LONGEST_SHOWN_INTEGER} digits", node.start_mark)
        return value


def _expanded(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Count the values and keys of a node, those that aliases repeat each time."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise _problem("a value holds itself, by an alias", node.start_mark)
        return size
    sizes[id(node)] = None
    size = 1
    for held in _held(node):
        size += _expanded(held, sizes)
        if size > MAX_NODES:
            raise _problem(f"its aliases make more than {MAX_NODES} values and keys of it", node.start_mark)
    sizes[id(node)] = size
    return size


def _held(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [each for pair in node.value for each in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _problem(text: str, mark: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(problem=text, problem_mark=mark)


def load_limited(text: str, source: str, loader: type[LimitedLoader]) -> Any:
    """Return what a YAML text holds.

    Args:
        source: of the text, for messages.

    Raises:
        ConfigError: it is no YAML, or more of it than the limits allow; with the line.
    """
    try:
        return yaml.load(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{place}: {error.problem}; correct the YAML") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}; correct the YAML") from None
