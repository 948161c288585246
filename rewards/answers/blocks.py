"""Lists below the words that announce an answer: "Answer:", and a line for each of its parts."""

from __future__ import annotations

import re

from alignlab_rewards.answers.markup import without_delimiters, without_markdown

_MARKER = re.compile(r"^[ \t]*(?:[-*•]|\d{1,2}[.)])[ \t]+")
_VALUE = re.compile(r"(?:[A-Za-z](?:_\w+)?\s*=\s*)?[-+\u2212]?(?:[\d.,/^ ]+|\\?[A-Za-z]*[({\d][^A-Za-z=]*)")


def list_below(text: str) -> tuple[list[str], int]:
    """Return the items of the list that a text begins with, and where it ends; no items for fewer than two."""
    items: list[str] = []
    position = end = 0
    for number, line in enumerate(text.splitlines(keepends=True)):
        position += len(line)
        if number and _MARKER.match(line):
            items.append(_MARKER.sub("", line).strip())
            end = position
        elif line.strip(" \t*_:\n"):
            break
    return (items, end) if len(items) > 1 else ([], 0)


def block_answer(items: list[str]) -> str:
    """Return the items as one answer where each is a value, else the last one that is emphasised, else the last."""
    plain = [without_delimiters(without_markdown(item)).strip().rstrip(".") for item in items]
    if all(_VALUE.fullmatch(item) for item in plain):
        return ", ".join(plain)
    return next((item for item in reversed(items) if "**" in item), items[-1])
