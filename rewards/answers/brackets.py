"""Brackets of an answer's text: what stands outside of all of them, and what they enclose."""

from __future__ import annotations

import re
from collections.abc import Iterator


def encloses(text: str, opening: str, closing: str) -> bool:
    """True where the first bracket is closed by the last."""
    depth, position = 0, 0
    if opening == "]":
        return text.count("]") + text.count("[") == 2 or (text.endswith("]") and text.count("]") == 2)
    while position < len(text):
        step = _bracket_step(text, position)
        depth += step[0]
        position += step[1]
        if depth == 0 and position < len(text):
            return False
    return depth == 0


def _bracket_step(text: str, position: int) -> tuple[int, int]:
    """The change of depth at a position, and how many characters it takes."""
    character = text[position]
    if character == "\\":
        for name, change in (("\\{", 1), ("\\}", -1), ("\\langle", 1), ("\\rangle", -1)):
            if text.startswith(name, position):
                return change, len(name)
        return 0, 2
    return (1 if character in "([{" else -1 if character in ")]}" else 0), 1


def _top_level(text: str, separator: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Matches of a separator outside all brackets."""
    depths, position, depth = {}, 0, 0
    while position < len(text):
        depths[position] = depth
        change, length = _bracket_step(text, position)
        depth = max(0, depth + change)
        position += length
    for match in separator.finditer(text):
        if depths.get(match.start(), 1) == 0:
            yield match


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    parts, start = [], 0
    for match in _top_level(text, separator):
        parts.append(text[start : match.start()])
        start = match.end()
    return [*parts, text[start:]]


def separators(text: str, separator: re.Pattern[str]) -> list[str]:
    return [match[0] for match in _top_level(text, separator)]
