"""The forms in which chat templates take the same messages.

Templates differ in what they read: arguments of a call as a mapping or as JSON text, no content or an empty one beside
a call, a thought under one name or another, a content as text or as parts. The forms are tried in an order, and the
first one of which the template loses nothing is used.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from alignlab.data.messages import THOUGHT_FIELDS
from alignlab.types import Message

Change = Callable[[dict[str, Any]], dict[str, Any]]


def forms_of(messages: Sequence[Message]) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages as they are, and then in each other form that makes a difference to them."""
    changes = [change for change in _CHANGES if any(change(dict(message)) != message for message in messages)]
    for number in range(len(changes) + 1):
        for chosen in itertools.combinations(changes, number):
            yield [_changed(message, chosen) for message in messages]


def _changed(message: Message, changes: Sequence[Change]) -> dict[str, Any]:
    made = dict(message)
    for change in changes:
        made = change(made)
    return made


def _arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return message if not calls else {**message, "tool_calls": [_call_with_text(call) for call in calls]}


def _call_with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    if not isinstance(function.get("arguments"), Mapping):
        return dict(call)
    written = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return written if function is call else {**call, "function": written}


def _thought_under_each_name(message: dict[str, Any]) -> dict[str, Any]:
    thought = next((message[name] for name in THOUGHT_FIELDS if message.get(name)), None)
    return message if thought is None else {**message, **dict.fromkeys(THOUGHT_FIELDS, thought)}


def _no_content_beside_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": None} if message.get("tool_calls") and message["content"] == "" else message


def _content_as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


_CHANGES: tuple[Change, ...] = (
    _arguments_as_text, _thought_under_each_name, _no_content_beside_calls, _content_as_parts,
)  # fmt: skip
