"""Chat messages as rows have them, in the one form that the rest of the package works with.

Every message has a role and a content that is a string. Parts of text are joined; what is no text is refused. Calls of
tools are a list of mappings, as OpenAI's and Hugging Face's data have them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from transformers.utils import get_json_schema

from alignlab.data.nesting import parse_json
from alignlab.data.thoughts import THOUGHT_FIELDS
from alignlab.types import Text

logger = logging.getLogger(__name__)

TAUGHT_FIELDS = ("weight", "train")
"""Fields of OpenAI's and others' messages that say whether a turn of the assistant's is taught."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MISNAMED = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "ai": "assistant", "bot": "assistant",
    "model": "assistant",
} | dict(zip(_ROLES, _ROLES, strict=True))
"""Roles by what other data call them, in small letters."""
_SHAREGPT = _MISNAMED | {"function_response": "tool", "observation": "tool"}
_SHAREGPT_CALLS = ("function_call", "tool_call")
SPEAKERS = frozenset((*_SHAREGPT, *_SHAREGPT_CALLS))
"""All names of speakers that are known here, in small letters."""
_OF_ARGUMENTS = ("parameters", "input", "args")
"""What the arguments of a call are called in other data."""
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_TEXT_PARTS = ("text", "input_text", "output_text")


class BadRow(Exception):
    """A row that cannot be used: `reason` is counted, the message says what is wrong and how to mend it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def check_text(value: Any, column: str) -> Text:
    """Return a non-empty string, or chat messages in the form of this module; fields that are None are left out.

    Raises:
        BadRow: anything else.
    """
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty", f"has an empty string in the column {column!r}")
        check_characters(value, column)
        return value
    if getattr(value, "ndim", None) == 1:
        value = value.tolist()  # pandas reads lists as arrays
    if not isinstance(value, Sequence) or isinstance(value, bytes | bytearray | memoryview):
        raise BadRow(
            "wrong_type",
            f"has {type(value).__name__} in the column {column!r}, which holds a string or a list of chat messages",
        )
    if not value:
        raise BadRow("empty", f"has an empty list in the column {column!r}")
    messages = [_message(message, column) for message in value]
    check_characters(messages, column)
    return messages


def check_characters(value: Any, column: str) -> None:
    """Refuse text with half a character, such as a lone "\\ud83d": it is no text in any encoding.

    Args:
        value: text, or lists and dicts of it.

    Raises:
        BadRow: it has one.
    """
    for text in _texts(value):
        half = None if text.isascii() else _HALF_CHARACTER.search(text)
        if half is not None:
            raise BadRow(
                "not_unicode",
                f"has half a character (U+{ord(half.group()):X}) in the column {column!r}, which no tokenizer takes; "
                "cut its text between characters",
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def without_value(row: Mapping[str, Any], column: str) -> BadRow:
    """Return the complaint about a row that lacks a column, or has nothing in it."""
    what = f"has nothing in the column {column!r}" if column in row else f"has no column {column!r}, but {sorted(row)}"
    return BadRow("missing_column", what)


def check_media(row: Mapping[str, Any], *, of_message: bool = False) -> None:
    """Refuse a row, or a message, with an image, a film or a sound: models here read text.

    Raises:
        BadRow: a column for one of these holds something.
    """
    where, fix = ("the column", "use rows without, or rename the column where it is for the rewards")
    if of_message:
        where, fix = "a message's field", "use rows without"
    for name in _MEDIA_COLUMNS:
        value = row.get(name)
        if value is None or value is False or (hasattr(value, "__len__") and len(value) == 0):
            continue
        raise BadRow(
            "media",
            f"has something in {where} {name!r}, and models here read text alone; {fix}",
        )


def tools_of(value: Any) -> list[dict[str, Any]]:
    """Return the tools of a row's column: schemas, or functions that schemas are made of; the list, or its JSON text.

    Raises:
        BadRow: it is something else, or a tool has no name.
    """
    value = _from_json(value, "tools")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow("wrong_type", f"has {type(value).__name__} in the column 'tools', which holds a list of tools")
    tools = [without_none(_tool(tool)) for tool in value]
    for tool in tools:
        if not tool_name(tool):
            raise BadRow("wrong_type", f"has a tool without a name in the column 'tools': {tool!r:.80}")
    check_characters(tools, "tools")
    return tools


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return the name of a tool or of a call; empty where there is none."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else tool.get("name")
    return name if isinstance(name, str) else ""


def template_values_of(value: Any) -> dict[str, Any]:
    """Return the template's variables of a row's column `chat_template_kwargs`; those that are None are left out.

    Raises:
        BadRow: it is no mapping, nor the JSON text of one.
    """
    value = _from_json(value, "chat_template_kwargs")
    if not isinstance(value, Mapping):
        raise BadRow(
            "wrong_type",
            f"has {type(value).__name__} in the column 'chat_template_kwargs', which holds a mapping, such as "
            '{"enable_thinking": false}',
        )
    check_characters(value, "chat_template_kwargs")
    return {str(name): held for name, held in value.items() if held is not None}


def template_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a prompt that its chat template was given, as JSON, for a row that is rendered again.

    Columns of these names that no template can take are for the rewards, and left out.
    """
    made: dict[str, Any] = {}
    readers: dict[str, Callable[[Any], Any]] = {"tools": tools_of, "chat_template_kwargs": template_values_of}
    for name, read in readers.items():
        if columns.get(name) is not None:
            with suppress(BadRow):
                made[name] = read(columns[name])
    return made


def is_taught(message: Mapping[str, Any]) -> bool:
    """Return whether a message of the assistant's is taught: it is, unless its `weight` is 0 or its `train` false.

    Raises:
        BadRow: one of the two is another value, such as a weight of 0.5.
    """
    for name in TAUGHT_FIELDS:
        if message.get(name, 1) not in (0, 1):
            raise BadRow(
                "wrong_type",
                f"has {message[name]!r:.40} for {name} in a message, which is 1 (taught) or 0 (read and not taught); "
                "turns have no other weights here",
            )
    return all(message.get(name, 1) for name in TAUGHT_FIELDS)


def without_none(value: Any) -> Any:
    """Return a structure without the fields that are None: a table of `datasets` fills up mappings with them."""
    if isinstance(value, Mapping):
        return {key: without_none(held) for key, held in value.items() if held is not None}
    if isinstance(value, list | tuple):
        return [without_none(held) for held in value]
    return value


def _message(message: Any, column: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _no_message(message, column)
    made = _with_role({key: part for key, part in message.items() if part is not None}, column)
    check_media(made, of_message=True)
    calls = _calls(made.pop("tool_calls", None)) or _legacy_calls(made.pop("function_call", None))
    if calls:
        made["tool_calls"] = calls
    for name in THOUGHT_FIELDS:
        if name in made:
            made[name] = _thought(made[name], name)
    if made.get("content") is None:
        if not calls and not any(made.get(name) for name in THOUGHT_FIELDS):
            raise _no_message(message, column)
        made["content"] = ""
    elif isinstance(made["content"], Mapping) and made["role"] == "tool":
        made["content"] = json.dumps(made["content"], ensure_ascii=False)
    elif not isinstance(made["content"], str):
        made = _with_joined_parts(made, column)
    return made


def _with_role(message: dict[str, Any], column: str) -> dict[str, Any]:
    """Return a message with `role` and `content`, also of one in ShareGPT's form, with `from` and `value`.

    Raises:
        BadRow: it has no role, or one under a name that chat templates do not know.
    """
    if "role" not in message and isinstance(message.get("from"), str) and "value" in message:
        speaker, value = message["from"].lower(), message["value"]
        others = {key: held for key, held in message.items() if key not in ("from", "value")}
        if speaker in _SHAREGPT_CALLS:
            return {"role": "assistant", "tool_calls": [value], **others}
        return {"role": _SHAREGPT.get(speaker, message["from"]), "content": value, **others}
    role = message.get("role")
    if not isinstance(role, str):
        raise _no_message(message, column)
    known = _MISNAMED.get(role.strip().lower(), role)
    if known != role:
        raise BadRow(
            "wrong_type",
            f"has a message of the role {role!r} in the column {column!r}, which chat templates know as {known!r}; "
            "write that",
        )
    return message


def _no_message(message: Any, column: str) -> BadRow:
    return BadRow(
        "wrong_type",
        f"has {message!r:.80} in the column {column!r}, where each chat message is a dict of role and content; the "
        "content may be missing beside tool_calls alone",
    )


def _with_joined_parts(message: dict[str, Any], column: str) -> dict[str, Any]:
    """Join the parts of a content: its texts to the content, its thoughts to the message's thought."""
    parts = message["content"]
    if not isinstance(parts, Sequence) or isinstance(parts, bytes):
        raise BadRow(
            "wrong_type",
            f"has a content of type {type(parts).__name__} in the column {column!r}, which must be text; write it as a "
            "string",
        )
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        kind, text = _part(part, column)
        (thoughts if kind == "thought" else texts).append(text)
    joined = {**message, "content": "".join(texts)}
    if thoughts:
        name = next((name for name in THOUGHT_FIELDS if message.get(name)), THOUGHT_FIELDS[0])
        joined[name] = "".join([str(message.get(name, "")), *thoughts])
    return joined


def _part(part: Any, column: str) -> tuple[str, str]:
    """Return ("text" or "thought", the text) of a part of a content."""
    if isinstance(part, str):
        return "text", part
    if isinstance(part, Mapping):
        kind = part.get("type", "text" if "text" in part else None)
        if kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            return "text", part["text"]
        if kind in THOUGHT_FIELDS and part.get(kind) is not None:
            return "thought", _thought(part[kind], str(kind))
        if any(word in str(kind) for word in ("image", "video", "audio", "file")):
            raise BadRow(
                "media",
                f"has a part of type {kind!r} in a content of the column {column!r}, and models here read text alone; "
                "use rows without",
            )
    raise BadRow(
        "wrong_type",
        f"has the part {part!r:.80} in a content of the column {column!r}, where a part is "
        '{"type": "text", "text": ...}; write the content as text',
    )


def _thought(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "".join(_part(part, name)[1] for part in value)
    raise BadRow("wrong_type", f"has {type(value).__name__} in a message's field {name!r}, which holds text")


def _calls(value: Any) -> list[dict[str, Any]]:
    """Return the calls of tools of a message, with their arguments as a mapping where they are one, or JSON of one."""
    if value is None:
        return []
    value = _from_json(value, "tool_calls")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow("wrong_type", f"has {type(value).__name__} in a message's tool_calls, which is a list of calls")
    return [_call(call) for call in value]


def _legacy_calls(value: Any) -> list[dict[str, Any]]:
    """Return the one call of OpenAI's older form, `function_call`, as a list of calls."""
    return [] if value is None else [_call({"type": "function", "function": value})]


def _call(call: Any) -> dict[str, Any]:
    call = _from_json(call, "tool_calls")
    if not isinstance(call, Mapping) or not tool_name(call):
        raise BadRow(
            "wrong_type",
            f"has the call {call!r:.80} in a message's tool_calls, where a call is "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}',
        )
    made = {key: held for key, held in call.items() if held is not None}
    function = dict(made["function"]) if isinstance(made.get("function"), Mapping) else made
    other = next((name for name in _OF_ARGUMENTS if name in function), None)
    if "arguments" not in function and other is not None:
        function["arguments"] = function.pop(other)
    if "arguments" in function:
        function["arguments"] = _arguments(function["arguments"])
    return {**made, "function": function} if function is not made else made


def _arguments(value: Any) -> Any:
    """Return a mapping where it is one or the JSON text of one, without what `datasets` filled up; else as it is."""
    if isinstance(value, str):
        try:
            parsed = parse_json(value)
        except ValueError:
            return value
        return parsed if isinstance(parsed, dict) else value
    filled = without_none(value)
    if filled != value:
        _say_arguments_of_none()
    return filled


@cache
def _say_arguments_of_none() -> None:
    logger.warning(
        "arguments of tool calls that are null are left out, because tables of `datasets` fill up mappings with them; "
        "to keep a null, give the arguments as JSON text"
    )


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise BadRow("wrong_type", f"has text in {name!r} that is no JSON: {error}; write it as JSON") from error


def _tool(tool: Any) -> Any:
    tool = _from_json(tool, "tools")
    if isinstance(tool, Mapping):
        return tool
    if callable(tool):
        try:
            return get_json_schema(tool)
        except Exception as error:  # no docstring, no type hints, ...
            raise BadRow("wrong_type", f"has a function in 'tools' that no schema can be made of: {error}") from error
    raise BadRow("wrong_type", f"has {type(tool).__name__} in 'tools', where a tool is a JSON schema or a function")
