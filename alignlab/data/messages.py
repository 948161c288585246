"""Normalisation of the chat messages in rows to the one form that the rest of the package reads.

Every message has a role and a content that is a string. Parts of text are joined; images and the like are refused.
Calls of tools are a list of mappings, as in OpenAI's and Hugging Face's data.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from alignlab.data.bad_row import BadRow, check_characters
from alignlab.data.chat.thoughts import THOUGHT_FIELDS
from alignlab.data.chat.tool_calls import calls_of, legacy_calls_of
from alignlab.types import Text

TAUGHT_FIELDS = ("weight", "train")
"""Fields of messages, such as OpenAI's, that select the assistant's turns to train on."""
_ROLES = ("system", "developer", "user", "assistant", "tool")
_MISNAMED = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "ai": "assistant", "bot": "assistant",
    "model": "assistant",
} | dict(zip(_ROLES, _ROLES, strict=True))
"""Role by its lower-case name in other data."""
_SHAREGPT = _MISNAMED | {"function_response": "tool", "observation": "tool"}
_SHAREGPT_CALLS = ("function_call", "tool_call")
SPEAKERS = frozenset((*_SHAREGPT, *_SHAREGPT_CALLS))
"""All lower-case names of speakers that are recognised."""
_MEDIA_COLUMNS = ("image", "images", "video", "videos", "audio", "audios")
_TEXT_PARTS = ("text", "input_text", "output_text")


def check_text(value: Any, column: str) -> Text:
    """Return a non-empty string, or chat messages in the form of this module, without fields that are None.

    Raises:
        BadRow: the value is neither.
    """
    if isinstance(value, str):
        if not value.strip():
            raise BadRow("empty", f"has an empty string in the column {column!r}")
        check_characters(value, column)
        return value
    if getattr(value, "ndim", None) == 1:
        value = value.tolist()  # pandas turns lists into arrays
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


def check_media(row: Mapping[str, Any], *, of_message: bool = False) -> None:
    """Refuse a row, or a message, with an image, a video or a sound: models here read text alone.

    Raises:
        BadRow: a column or a field for one of these is not empty.
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


def is_taught(message: Mapping[str, Any]) -> bool:
    """Return True if a message of the assistant's is trained on: unless its `weight` is 0 or its `train` false.

    Raises:
        BadRow: one of the two has another value, such as a weight of 0.5.
    """
    for name in TAUGHT_FIELDS:
        if message.get(name, 1) not in (0, 1):
            raise BadRow(
                "wrong_type",
                f"has {message[name]!r:.40} for {name} in a message, which is 1 (taught) or 0 (read and not taught); "
                "turns have no other weights here",
            )
    return all(message.get(name, 1) for name in TAUGHT_FIELDS)


def _message(message: Any, column: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _no_message(message, column)
    normal = _with_role({key: value for key, value in message.items() if value is not None}, column)
    check_media(normal, of_message=True)
    calls = calls_of(normal.pop("tool_calls", None)) or legacy_calls_of(normal.pop("function_call", None))
    if calls:
        normal["tool_calls"] = calls
    for name in THOUGHT_FIELDS:
        if name in normal:
            normal[name] = _thought(normal[name], name)
    return _with_text_content(normal, message, column)


def _with_text_content(normal: dict[str, Any], message: Mapping[str, Any], column: str) -> dict[str, Any]:
    """Return a message with a content that is a string.

    Args:
        normal: the message with its role, calls and thoughts in their normal form.
        message: the message as the row has it.
    """
    content = normal.get("content")
    if isinstance(content, str):
        return normal
    if content is None:
        if not any(normal.get(name) for name in ("tool_calls", *THOUGHT_FIELDS)):
            raise _no_message(message, column)
        return {**normal, "content": ""}
    if isinstance(content, Mapping) and normal["role"] == "tool":
        return {**normal, "content": json.dumps(content, ensure_ascii=False)}
    return _with_joined_parts(normal, column)


def _with_role(message: dict[str, Any], column: str) -> dict[str, Any]:
    """Return a message with `role` and `content`, also for one in ShareGPT's form, with `from` and `value`.

    Raises:
        BadRow: the message has no role, or one that chat templates know under another name.
    """
    if "role" not in message and isinstance(message.get("from"), str) and "value" in message:
        speaker, value = message["from"].lower(), message["value"]
        further = {key: field for key, field in message.items() if key not in ("from", "value")}
        if speaker in _SHAREGPT_CALLS:
            return {"role": "assistant", "tool_calls": [value], **further}
        return {"role": _SHAREGPT.get(speaker, message["from"]), "content": value, **further}
    role = message.get("role")
    if not isinstance(role, str):
        raise _no_message(message, column)
    template_role = _MISNAMED.get(role.strip().lower(), role)
    if template_role != role:
        raise BadRow(
            "wrong_type",
            f"has a message of the role {role!r} in the column {column!r}, which chat templates know as "
            f"{template_role!r}; write that",
        )
    return message


def _no_message(message: Any, column: str) -> BadRow:
    return BadRow(
        "wrong_type",
        f"has {message!r:.80} in the column {column!r}, where each chat message is a dict of role and content; the "
        "content may be missing beside tool_calls alone",
    )


def _with_joined_parts(message: dict[str, Any], column: str) -> dict[str, Any]:
    """Join the texts among a content's parts to the content, and the thoughts to the message's thought."""
    content = message["content"]
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise BadRow(
            "wrong_type",
            f"has a content of type {type(content).__name__} in the column {column!r}, which must be text; write it as "
            "a string",
        )
    texts: list[str] = []
    thoughts: list[str] = []
    for item in content:
        kind, text = _part(item, column)
        (thoughts if kind == "thought" else texts).append(text)
    joined = {**message, "content": "".join(texts)}
    if thoughts:
        name = next((name for name in THOUGHT_FIELDS if message.get(name)), THOUGHT_FIELDS[0])
        joined[name] = "".join([str(message.get(name, "")), *thoughts])
    return joined


def _part(item: Any, column: str) -> tuple[str, str]:
    """Return ("text" or "thought", the text) of a part of a content, in any of the usual forms."""
    if isinstance(item, str):
        return "text", item
    if isinstance(item, Mapping):
        kind = item.get("type", "text" if "text" in item else None)
        if kind in _TEXT_PARTS and isinstance(item.get("text"), str):
            return "text", item["text"]
        if kind in THOUGHT_FIELDS and item.get(kind) is not None:
            return "thought", _thought(item[kind], str(kind))
        if any(word in str(kind) for word in ("image", "video", "audio", "file")):
            raise BadRow(
                "media",
                f"has a part of type {kind!r} in a content of the column {column!r}, and models here read text alone; "
                "use rows without",
            )
    raise BadRow(
        "wrong_type",
        f"has the part {item!r:.80} in a content of the column {column!r}, where a part is "
        '{"type": "text", "text": ...}; write the content as text',
    )


def _thought(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return "".join(_part(item, name)[1] for item in value)
    raise BadRow("wrong_type", f"has {type(value).__name__} in a message's field {name!r}, which holds text")
