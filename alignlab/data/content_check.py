"""The check that nothing is lost between a row and what a model reads: by content.

Each text that a row holds (contents, thoughts, names and arguments of tool calls, names of tools) must stand in the
text that the chat template makes of it. White space is not compared, because templates trim; a text in JSON may be
escaped. The check is a search in a string, so that every row can be checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignlab.data.messages import TAUGHT_FIELDS, tool_name
from alignlab.data.thoughts import THOUGHT_FIELDS, thoughts_and_texts
from alignlab.types import Message

Kind = Literal["text", "thought", "tool call", "tool", "document"]

_CHECKED_FIELDS = frozenset(("role", "content", "tool_calls", *THOUGHT_FIELDS, *TAUGHT_FIELDS))
"""Fields of a message whose texts are fragments, or that say how it is used."""


@dataclass(frozen=True)
class Fragment:
    """A text that has to be in what a model reads.

    Attributes:
        kind: what it is.
        message: index of its message; -1 for what belongs to none.
        role: of the message.
        text: the fragment, as the row has it.
        spellings: the ways in which a template may write it, without white space; one of them is enough.
        unwanted: a spelling that must not stand there: Python's way to print a mapping.
    """

    kind: Kind
    message: int
    role: str
    text: str
    spellings: tuple[str, ...]
    unwanted: str | None = None

    @property
    def described(self) -> str:
        """The fragment in the words of an error message."""
        shown = repr(self.text if len(self.text) <= 60 else f"{self.text[:57]}...")
        if self.message < 0:
            return f"the {self.kind} {shown}"
        return f"the {self.kind} {shown} of message {self.message} ({self.role})"


def fragments_of(messages: Sequence[Message]) -> list[Fragment]:
    """Return all that messages hold, in their order."""
    return [fragment for i, message in enumerate(messages) for fragment in _of_message(i, message)]


def fragments_of_tools(tools: Iterable[Mapping[str, Any]]) -> list[Fragment]:
    """Return the names of tools: how much else of a tool is written is the template's own."""
    return [_fragment("tool", -1, "", tool_name(tool)) for tool in tools]


def fragments_of_documents(documents: Any) -> list[Fragment]:
    """Return the texts of the documents that a template for retrieval is given."""
    given = documents if isinstance(documents, Sequence) else ()
    texts = [document.get("text") for document in given if isinstance(document, Mapping)]
    return [_fragment("document", -1, "", text) for text in texts if isinstance(text, str) and text.strip()]


def other_fields(messages: Sequence[Message]) -> dict[tuple[str, str], int]:
    """Return (role, field) -> first message of the fields beside a chat's own that hold something, such as `name`."""
    found: dict[tuple[str, str], int] = {}
    for i, message in enumerate(messages):
        for name, value in message.items():
            if name not in _CHECKED_FIELDS and _holds_something(value):
                found.setdefault((str(message["role"]), name), i)
    return found


def missing(fragments: Iterable[Fragment], rendered: str) -> list[Fragment]:
    """Return the fragments that are not in a rendered text."""
    squeezed = _squeezed(rendered)
    return [
        fragment
        for fragment in fragments
        if not any(spelling in squeezed for spelling in fragment.spellings)
        or (fragment.unwanted is not None and fragment.unwanted in squeezed)
    ]


def _of_message(index: int, message: Message) -> list[Fragment]:
    role = str(message["role"])
    found = [
        _fragment("thought", index, role, str(message[name]))
        for name in THOUGHT_FIELDS
        if str(message.get(name, "")).strip()
    ]
    found += _of_content(index, role, str(message["content"]))
    for call in message.get("tool_calls", ()):
        found += _of_call(index, role, call)
    return found


def _of_content(index: int, role: str, content: str) -> list[Fragment]:
    """Return a content, cut at the tags around thoughts: templates move what is between them."""
    if role != "assistant":
        return [_fragment("text", index, role, content)] if content.strip() else []
    pieces = thoughts_and_texts(content)
    return [_fragment("thought" if thought else "text", index, role, text) for thought, text in pieces if text.strip()]


def _of_call(index: int, role: str, call: Mapping[str, Any]) -> list[Fragment]:
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    arguments = function.get("arguments")
    found = [_fragment("tool call", index, role, tool_name(call))]
    found += [_fragment("tool call", index, role, text, *others) for text, *others in _leaves(arguments)]
    if isinstance(arguments, Mapping) and arguments:
        printed = _squeezed(str(arguments))
        found.append(Fragment("tool call", index, role, json.dumps(arguments), ("",), printed))
    return [fragment for fragment in found if fragment.text.strip()]


def _leaves(value: Any) -> list[tuple[str, ...]]:
    """Return the keys and values in a structure, each with the other ways to write it."""
    if isinstance(value, Mapping):
        return [leaf for key, held in value.items() for leaf in ((str(key),), *_leaves(held))]
    if isinstance(value, list | tuple):
        return [leaf for held in value for leaf in _leaves(held)]
    if isinstance(value, str):
        return [(value,)]
    return [] if value is None else [(json.dumps(value), str(value))]


def _fragment(kind: Kind, message: int, role: str, text: str, *others: str) -> Fragment:
    ways = (text, *others, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return Fragment(kind, message, role, text, tuple(dict.fromkeys(map(_squeezed, ways))))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _holds_something(value: Any) -> bool:
    return len(value) > 0 if hasattr(value, "__len__") else bool(value)
