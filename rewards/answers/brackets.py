"""Brackets of an answer's text: the parts outside of all of them, and the part that they enclose."""

from __future__ import annotations

import re
from collections.abc import Iterator

_LATEX_BRACKETS = {"\\{": 1, "\\}": -1, "\\langle": 1, "\\rangle": -1}


def encloses(text: str) -> bool:
    """Return True if the first bracket is closed by the last, and not before."""
    depth = position = 0
    while position < len(text):
        change, length = _bracket_step(text, position)
        depth += change
        position += length
        if depth == 0 and position < len(text):
            return False
    return depth == 0


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Return the parts of a text between the separators that stand outside all brackets."""
    pieces, start = [], 0
    for match in _top_level(text, separator):
        pieces.append(text[start : match.start()])
        start = match.end()
    return [*pieces, text[start:]]


def separators(text: str, separator: re.Pattern[str]) -> list[str]:
    """Return the separators that stand outside all brackets."""
    return [match[0] for match in _top_level(text, separator)]


def _bracket_step(text: str, position: int) -> tuple[int, int]:
    """Return the change of depth at a position, and the number of characters there that belong together."""
    character = text[position]
    if character != "\\":
        return (1 if character in "([{" else -1 if character in ")]}" else 0), 1
    for name, change in _LATEX_BRACKETS.items():
        if text.startswith(name, position):
            return change, len(name)
    return 0, 2


def _top_level(text: str, separator: re.Pattern[str]) -> Iterator[re.Match[str]]:
    """Yield the matches of a separator outside all brackets."""
    depths, position, depth = {}, 0, 0
    while position < len(text):
        depths[position] = depth
        change, length = _bracket_step(text, position)
        depth = max(0, depth + change)
        position += length
    for match in separator.finditer(text):
        if depths.get(match.start(), 1) == 0:
            yield match
