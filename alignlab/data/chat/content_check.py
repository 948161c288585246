"""Check that the text which a model reads contains all that the row holds.

Each text of a row (contents, thoughts, names and arguments of tool calls, names of tools) must occur in the rendered
text. White space is ignored, because templates trim it; a text in JSON may be escaped. The check is a search in a
string, fast enough for every row.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignlab.data.chat.thoughts import THOUGHT_FIELDS, thoughts_and_texts
from alignlab.data.chat.tool_calls import tool_name
from alignlab.data.messages import TAUGHT_FIELDS
from alignlab.types import Message

Kind = Literal["text", "thought", "tool call", "tool", "document"]

_CHECKED_FIELDS = frozenset(("role", "content", "tool_calls", *THOUGHT_FIELDS, *TAUGHT_FIELDS))
"""Fields of a message that are checked as fragments, or that control training."""


@dataclass(frozen=True)
class Fragment:
    """A text that has to occur in the rendered text.

    Attributes:
        kind: kind of content.
        message: index of its message; -1 if it belongs to none.
        role: role of the message.
        text: the fragment, as in the row.
        spellings: forms in which a template may write the fragment, without white space; one of them is enough.
        unwanted: a form that must not occur: a mapping as Python prints it.
    """

    kind: Kind
    message: int
    role: str
    text: str
    spellings: tuple[str, ...]
    unwanted: str | None = None

    @property
    def described(self) -> str:
        """Description of the fragment for messages."""
        excerpt = repr(self.text if len(self.text) <= 60 else f"{self.text[:57]}...")
        if self.message < 0:
            return f"the {self.kind} {excerpt}"
        return f"the {self.kind} {excerpt} of message {self.message} ({self.role})"


def fragments_of(messages: Sequence[Message]) -> list[Fragment]:
    """Return all fragments of messages, in order."""
    return [fragment for i, message in enumerate(messages) for fragment in _of_message(i, message)]


def fragments_of_tools(tools: Iterable[Mapping[str, Any]]) -> list[Fragment]:
    """Return the names of tools; a template may leave out other fields of a tool."""
    return [_fragment("tool", -1, "", tool_name(tool)) for tool in tools]


def fragments_of_documents(documents: Any) -> list[Fragment]:
    """Return the texts of documents, a variable of templates for retrieval."""
    listed = documents if isinstance(documents, Sequence) else ()
    texts = [document.get("text") for document in listed if isinstance(document, Mapping)]
    return [_fragment("document", -1, "", text) for text in texts if isinstance(text, str) and text.strip()]


def other_fields(messages: Sequence[Message]) -> dict[tuple[str, str], int]:
    """Return (role, field) -> index of its first message, for further fields of messages, such as `name`."""
    first_messages: dict[tuple[str, str], int] = {}
    for i, message in enumerate(messages):
        for name, value in message.items():
            if name not in _CHECKED_FIELDS and _holds_something(value):
                first_messages.setdefault((str(message["role"]), name), i)
    return first_messages


def missing(fragments: Iterable[Fragment], rendered: str) -> list[Fragment]:
    """Return the fragments that do not occur in a rendered text."""
    squeezed = _squeezed(rendered)
    return [
        fragment
        for fragment in fragments
        if not any(spelling in squeezed for spelling in fragment.spellings)
        or (fragment.unwanted is not None and fragment.unwanted in squeezed)
    ]


def _of_message(index: int, message: Message) -> list[Fragment]:
    role = str(message["role"])
    fragments = [
        _fragment("thought", index, role, str(message[name]))
        for name in THOUGHT_FIELDS
        if str(message.get(name, "")).strip()
    ]
    fragments += _of_content(index, role, str(message["content"]))
    for call in message.get("tool_calls", ()):
        fragments += _of_call(index, role, call)
    return fragments


def _of_content(index: int, role: str, content: str) -> list[Fragment]:
    """Return the fragments of a content, cut at the tags around thoughts, because templates move thoughts."""
    if role != "assistant":
        return [_fragment("text", index, role, content)] if content.strip() else []
    pieces = thoughts_and_texts(content)
    return [
        _fragment("thought" if is_thought else "text", index, role, text) for is_thought, text in pieces if text.strip()
    ]


def _of_call(index: int, role: str, call: Mapping[str, Any]) -> list[Fragment]:
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    arguments = function.get("arguments")
    fragments = [_fragment("tool call", index, role, tool_name(call))]
    fragments += [_fragment("tool call", index, role, *spellings) for spellings in _leaves(arguments)]
    if isinstance(arguments, Mapping) and arguments:
        printed = _squeezed(str(arguments))
        fragments.append(Fragment("tool call", index, role, json.dumps(arguments), ("",), printed))
    return [fragment for fragment in fragments if fragment.text.strip()]


def _leaves(value: Any) -> list[tuple[str, ...]]:
    """Return the keys and values in a structure, each in all forms in which it may be written."""
    if isinstance(value, Mapping):
        return [leaf for key, held in value.items() for leaf in ((str(key),), *_leaves(held))]
    if isinstance(value, list | tuple):
        return [leaf for held in value for leaf in _leaves(held)]
    if isinstance(value, str):
        return [(value,)]
    return [] if value is None else [(json.dumps(value), str(value))]


def _fragment(kind: Kind, message: int, role: str, text: str, *other_forms: str) -> Fragment:
    forms = (text, *other_forms, json.dumps(text, ensure_ascii=False)[1:-1], json.dumps(text)[1:-1])
    return Fragment(kind, message, role, text, tuple(dict.fromkeys(map(_squeezed, forms))))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _holds_something(value: Any) -> bool:
    return len(value) > 0 if hasattr(value, "__len__") else bool(value)
