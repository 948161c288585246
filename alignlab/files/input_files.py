"""YAML and JSON files from outside, read within limits of size and nesting, YAML aliases expanded."""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from alignlab.errors import AlignlabError, ConfigError

MAX_SETTINGS_BYTES = 2**20
MAX_NODES = 20_000
"""Limit of the values and keys of a YAML text, each counted as often as aliases repeat it."""
MAX_DEPTH = 50
MAX_JSON_BYTES = 2**26
"""Limit of a JSON file that describes a model. The largest, an index of tensors, has a few MiB."""
LONGEST_SHOWN_INTEGER = 40
_FIX = "copy it again, or write it again"


def read_limited(path: Path, limit: int, kind: type[AlignlabError]) -> str:
    """Return the text of a file.

    Args:
        limit: largest size, in bytes.
        kind: class of the errors.

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
        kind: class of the errors.

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


class _LimitedLoader(yaml.SafeLoader):
    """YAML within the limits of a file of settings; every error is a YAMLError with the line.

    Two differences from plain YAML: 1e-6 is a number (YAML 1.1 wants 1.0e-6), and a key given twice is an error.
    """

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
        """Compose the only document, and count its values with aliases expanded."""
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _expanded(node, {})
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Return a dict; refuse a second value for a key."""
        keys: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in keys:
                raise _problem(f"{key} is given twice", key_node.start_mark)
            keys |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Return the value of a node; a text that its type cannot hold is a YAMLError."""
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


# The loader's own from here on: a library that vLLM imports makes texts of all timestamps in YAML's own loaders.
_TIMESTAMP: Any = yaml.SafeLoader.construct_yaml_timestamp
_LimitedLoader.add_constructor("tag:yaml.org,2002:timestamp", _TIMESTAMP)
_LimitedLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def _expanded(node: yaml.Node, sizes: dict[int, int | None]) -> int:
    """Return the number of values and keys of a node, aliases expanded."""
    if id(node) in sizes:
        size = sizes[id(node)]
        if size is None:
            raise _problem("a value holds itself, by an alias", node.start_mark)
        return size
    sizes[id(node)] = None
    size = 1
    for child in _children(node):
        size += _expanded(child, sizes)
        if size > MAX_NODES:
            raise _problem(f"its aliases make more than {MAX_NODES} values and keys of it", node.start_mark)
    sizes[id(node)] = size
    return size


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [child for pair in node.value for child in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []


def _problem(text: str, mark: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(problem=text, problem_mark=mark)


def parse_yaml(text: str, source: str) -> Any:
    """Return the content of a YAML text.

    Args:
        source: name of the text's source, for messages.

    Raises:
        ConfigError: the text is no YAML, gives a key twice, or exceeds a limit; with the line.
    """
    try:
        return yaml.load(text, Loader=_LimitedLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{source}{place}: {error.problem}; correct the YAML") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{source}: {error}; correct the YAML") from None
