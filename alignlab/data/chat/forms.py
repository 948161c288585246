"""Equivalent forms of the same messages, for chat templates that expect different ones.

Templates expect a call with or without a mapping `function` around it, its arguments as a mapping or as JSON text, no
content or an empty one beside a call, a thought in tags or in a field of some name, a content as text or as parts. The
forms are tried in order; the first one from which the template leaves nothing out is used.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from alignlab.data.chat.thoughts import THOUGHT_FIELDS, split_thought
from alignlab.types import Message

Change = Callable[[dict[str, Any]], dict[str, Any]]


def forms_of(messages: Sequence[Message], *, fields_first: bool = False) -> Iterator[list[dict[str, Any]]]:
    """Yield the messages unchanged, and then in each other form that differs.

    Args:
        fields_first: yield forms with thoughts in fields, instead of tags, first.
    """
    changes = [change for change in _CHANGES if any(change(dict(message)) != message for message in messages)]
    forms = [chosen for number in range(len(changes) + 1) for chosen in itertools.combinations(changes, number)]
    if fields_first:
        forms.sort(key=lambda chosen: _thought_in_fields not in chosen)
    for chosen in forms:
        yield [_changed(message, chosen) for message in messages]


def forms_of_tools(tools: Sequence[Mapping[str, Any]]) -> list[Sequence[Mapping[str, Any]]]:
    """Return tools unchanged, with a mapping `function` around each, and without one."""
    wrapped = [_wrapped_tool(tool) for tool in tools]
    return [tools, wrapped, [tool["function"] for tool in wrapped]]


def _wrapped_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(tool.get("function"), Mapping):
        return dict(tool)
    return {"type": "function", "function": {key: held for key, held in tool.items() if key != "type"}}


def _changed(message: Message, changes: Sequence[Change]) -> dict[str, Any]:
    changed = dict(message)
    for change in changes:
        changed = change(changed)
    return changed


def _with_calls(message: dict[str, Any], change: Callable[[Mapping[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return message if not calls else {**message, "tool_calls": [change(call) for call in calls]}


def _calls_wrapped(message: dict[str, Any]) -> dict[str, Any]:
    return _with_calls(message, _wrapped)


def _wrapped(call: Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(call.get("function"), Mapping):
        return dict(call)
    outer = {key: held for key, held in call.items() if key not in ("name", "arguments", "type")}
    inner = {key: call[key] for key in ("name", "arguments") if key in call}
    return {**outer, "type": "function", "function": inner}


def _calls_unwrapped(message: dict[str, Any]) -> dict[str, Any]:
    return _with_calls(message, _unwrapped)


def _unwrapped(call: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(call.get("function"), Mapping):
        return dict(call)
    outer = {key: held for key, held in call.items() if key not in ("function", "type")}
    return {**outer, **call["function"]}


def _arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    return _with_calls(message, _call_with_text)


def _call_with_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call["function"] if isinstance(call.get("function"), Mapping) else call
    if not isinstance(function.get("arguments"), Mapping):
        return dict(call)
    written = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return written if function is call else {**call, "function": written}


def _thought_in_fields(message: dict[str, Any]) -> dict[str, Any]:
    """Move a thought in tags of a content to the fields for thoughts."""
    if message["role"] != "assistant" or any(message.get(name) for name in THOUGHT_FIELDS):
        return message
    pieces = split_thought(message["content"])
    if pieces is None:
        return message
    thought, answer = pieces
    return {**message, **dict.fromkeys(THOUGHT_FIELDS, thought), "content": answer}


def _thought_under_each_name(message: dict[str, Any]) -> dict[str, Any]:
    thought = next((message[name] for name in THOUGHT_FIELDS if message.get(name)), None)
    return message if thought is None else {**message, **dict.fromkeys(THOUGHT_FIELDS, thought)}


def _no_content_beside_calls(message: dict[str, Any]) -> dict[str, Any]:
    return {**message, "content": None} if message.get("tool_calls") and message["content"] == "" else message


def _content_as_parts(message: dict[str, Any]) -> dict[str, Any]:
    content = message["content"]
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


_CHANGES: tuple[Change, ...] = (
    _calls_wrapped, _calls_unwrapped, _arguments_as_text, _thought_in_fields, _thought_under_each_name,
    _no_content_beside_calls, _content_as_parts,
)  # fmt: skip
