r"""The answer in `\boxed{}`: the last box of a text, or the last boxes that are one answer in several parts."""

from __future__ import annotations

import re
from typing import NamedTuple

_BOX = re.compile(r"\\(?:boxed|fbox|framebox|bbox)(?![A-Za-z])\s{0,3}")
_NAMES = ("\\boxed", "\\fbox", "\\framebox", "\\bbox")
_MAX_BOXES = 20
_LAYOUT = r"(?:[\s$.]|\\[()\[\]])*"
# Between two boxes of one answer: `\boxed{2} and $\boxed{3}$`, `\boxed{2}, y = \boxed{3}`.
_JOINER = re.compile(
    rf"{_LAYOUT}(?:,?\s*\b(and|or)\b|(,)){_LAYOUT}(?:(?:maybe|perhaps|possibly|even)\s)?"
    rf"{_LAYOUT}(?:[A-Za-z]\s?=)?{_LAYOUT}"
)
_NEXT_LINE = re.compile(_LAYOUT)
# A value with its name, `x = 2`: boxes of different names are one answer.
_NAMED = re.compile(r"\s*([A-Za-z](?:_\w+)?)\s*=[^=]*")

_WHOLE = r"[$€£]?([-\u2212]?\d{1,3}(?:,\d{3})+|[-\u2212]?\d+)"
_OR = rf"{_LAYOUT}\bor\b{_LAYOUT}(?:(?:maybe|perhaps|possibly|even)\s)?{_LAYOUT}"
_WHOLE_NUMBER = re.compile(rf"\s*{_WHOLE}\s*")
# `41 or \boxed{42}`, and `\boxed{42} or 41`.
_OR_BEFORE = re.compile(rf"(?<![\w.,]){_WHOLE}{_OR}\Z")
_OR_AFTER = re.compile(rf"{_LAYOUT},?{_OR}{_WHOLE}{_LAYOUT}(?:\Z|\n|(?<=[.!?$\)\s])\s)")
_MAX_BESIDE = 80


class Box(NamedTuple):
    """A box: its place in the text and its content."""

    start: int
    end: int
    content: str


def boxed(text: str) -> str | None:
    """Return the content of the last box that is not empty, or of the innermost box in it; None without a box.

    Boxes joined by "and", "or" or a comma are one answer. So are boxes below each other that give the values of
    different names.
    """
    box = _last_box(text, len(text))
    if box is None:
        return None
    contents, answer = {box.content}, box.content
    for _ in range(_MAX_BOXES - 1):
        before = _last_box(text, box.start)
        joiner = _joiner(text, before, box) if before is not None else None
        if before is None or joiner is None:
            break
        contents.add(before.content)
        answer = before.content + joiner + answer
        box = before
    return answer if len(contents) > 1 else box.content  # one answer boxed twice


def hedged_box(text: str) -> str | None:
    """Return both numbers where another whole number is offered beside the last box: `41 or \\boxed{42}`; else None."""
    box = _last_box(text, len(text))
    boxed_number = _WHOLE_NUMBER.fullmatch(box.content) if box is not None else None
    if box is None or boxed_number is None:
        return None
    before = _OR_BEFORE.search(text, max(0, box.start - _MAX_BESIDE), box.start)
    offer = before or _OR_AFTER.match(text[box.end : box.end + _MAX_BESIDE])
    if offer is None or offer[1] == boxed_number[1]:
        return None
    return f"{offer[1]} or {boxed_number[1]}" if before else f"{boxed_number[1]} or {offer[1]}"


def end_of_boxes(text: str) -> int:
    """Return the end of the last box that is not empty; 0 where there is none."""
    box = _last_box(text, len(text))
    return 0 if box is None else box.end


def _joiner(text: str, first: Box, second: Box) -> str | None:
    """Return " or " or a comma where two boxes are one answer; None where they are two."""
    if first.end > second.start:  # one in the other
        return None
    between = text[first.end : second.start]
    match = _JOINER.fullmatch(between)
    if match is not None:
        return " or " if match[1] == "or" else ", "
    names = [name[1] for box in (first, second) if (name := _NAMED.fullmatch(box.content))]
    return ", " if len(set(names)) == 2 and _NEXT_LINE.fullmatch(between) else None


def _last_box(text: str, end: int) -> Box | None:
    """Return the last box before a position that is not empty."""
    for _ in range(_MAX_BOXES):
        start = max(text.rfind(name, 0, end) for name in _NAMES)
        if start < 0:
            return None
        match = _BOX.match(text, start)
        box_end, content = _box_content(text, match.end()) if match is not None else (start, "")
        if content.strip():
            inner = boxed(content) if "\\" in content and _BOX.search(content) else None
            return Box(start, box_end, with_bound(inner or content))
        end = start
    return None


def with_bound(content: str) -> str:
    """Return a text with a leading ">" as LaTeX, since Markdown reads it as a quotation: `> 5` is a bound."""
    return re.sub(r"^\s*>(?!=)", r"\\gt ", content)


def _box_content(text: str, position: int) -> tuple[int, str]:
    """Return the end of a box and its content."""
    if not text.startswith("{", position):
        following = re.compile(r"\\?[^\s$\\,;]+").match(text, position)
        return (following.end(), following[0].rstrip(".")) if following is not None else (position, "")
    depth = 0
    for index in range(position, min(len(text), position + 5000)):
        character = text[index]
        if text[index - 1] == "\\" and text[index - 2] != "\\":
            continue
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return index + 1, text[position + 1 : index]
    # Never closed: up to the end of the formula or line.
    inside = re.split(r"\n|\$|\\\]|\\\)", text[position + 1 : position + 1000], maxsplit=1)[0]
    return position + 1 + len(inside), inside
