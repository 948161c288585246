"""The error of a row that cannot be used, and checks of columns that raise it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class BadRow(Exception):
    """A row that cannot be used: `reason` is counted, the message says what is wrong and how to correct it."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def without_value(row: Mapping[str, Any], column: str) -> BadRow:
    """Return the error of a row without a column, or with nothing in it."""
    if column in row:
        return BadRow("missing_column", f"has nothing in the column {column!r}")
    return BadRow("missing_column", f"has no column {column!r}, but {sorted(row)}")


def check_characters(value: Any, column: str) -> None:
    """Refuse text with half a surrogate pair, such as a lone "\\ud83d", which no encoding can write.

    Args:
        value: a text, or lists and dicts of texts.

    Raises:
        BadRow: with the code point.
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
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)
