"""Chats written as text in one cell of a table, as in CSV files."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

from alignlab.data.bad_row import BadRow
from alignlab.data.messages import SPEAKERS
from alignlab.data.notices import Notices

_COLUMNS = ("messages", "completion", "chosen", "rejected")
_BEGINS_AS_CHAT = re.compile(r"""\s*\[\s*\{\s*["'](?:role|from|content|value)["']\s*:""")
_SPEAKER = re.compile(r"""["'](?:role|from)["']\s*:\s*["'](\w+)["']""")


def with_chats(row: Mapping[str, Any], prompt_column: str, notices: Notices) -> dict[str, Any]:
    """Return a row in which texts that write a list of messages, as JSON or as Python prints it, are such lists.

    pandas writes a column of chats to CSV as Python prints them. Each column that is read so is logged once.

    Raises:
        BadRow: a text begins like a list of chat messages, and cannot be read as one.
    """
    parsed = dict(row)
    for name in (prompt_column, *_COLUMNS):
        chat = _chat_in(parsed[name], name) if isinstance(parsed.get(name), str) else None
        if chat is not None:
            notices.say(
                "chat in text", "the column %r has a list of chat messages as text, and is read as these messages", name
            )
            parsed[name] = chat
    return parsed


def _chat_in(text: str, column: str) -> list[Any] | None:
    """Return the messages that a text writes; None for any other text."""
    speaker = _SPEAKER.search(text) if _BEGINS_AS_CHAT.match(text) else None
    if speaker is None or speaker[1].lower() not in SPEAKERS:
        return None
    value, error = _parsed(text)
    if error is None:
        return value if _is_chat(value) else None
    raise BadRow(
        "wrong_type",
        f"has text in the column {column!r} that begins as a list of chat messages, and cannot be read as one: "
        f"{error}; write it as JSON",
    )


def _parsed(text: str) -> tuple[Any, Exception | None]:
    try:
        return json.loads(text), None
    except (ValueError, RecursionError) as error:
        complaint = error
    try:
        return ast.literal_eval(text.strip()), None
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None, complaint


def _is_chat(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, Mapping) and ("role" in message or "from" in message) for message in value
    )
