r"""Answers in `\boxed{}`: the last box of a text, or the last boxes where they are one answer in several parts."""

from __future__ import annotations

import re

_BOX = re.compile(r"\\(?:boxed|fbox|framebox|bbox)(?![A-Za-z])\s{0,3}")
_NAMES = ("\\boxed", "\\fbox", "\\framebox", "\\bbox")
_MAX_BOXES = 20
_LAYOUT = r"(?:[\s$.]|\\[()\[\]])*"
_JOINER = re.compile(
    rf"{_LAYOUT}(?:,?\s*\b(and|or)\b|(,)){_LAYOUT}(?:(?:maybe|perhaps|possibly|even)\s)?"
    rf"{_LAYOUT}(?:[A-Za-z]\s?=)?{_LAYOUT}"
)
_NEXT_LINE = re.compile(_LAYOUT)
_NAMED = re.compile(r"\s*([A-Za-z](?:_\w+)?)\s*=[^=]*")

_WHOLE = r"[$€£]?([-\u2212]?\d{1,3}(?:,\d{3})+|[-\u2212]?\d+)"
_OR = rf"{_LAYOUT}\bor\b{_LAYOUT}(?:(?:maybe|perhaps|possibly|even)\s)?{_LAYOUT}"
_WHOLE_NUMBER = re.compile(rf"\s*{_WHOLE}\s*")
_OR_BEFORE = re.compile(rf"(?<![\w.,]){_WHOLE}{_OR}\Z")
_OR_AFTER = re.compile(rf"{_LAYOUT},?{_OR}{_WHOLE}{_LAYOUT}(?:\Z|\n|(?<=[.!?$\)\s])\s)")
_MAX_BESIDE = 80

Box = tuple[int, int, str]


def boxed(text: str) -> str | None:
    """Return what stands in the last box that is not empty; the innermost of boxes in each other.

    Boxes joined by "and", "or" or a comma are one answer, and so are boxes below each other that give values of
    different names.
    """
    last = _last_box(text, len(text))
    if last is None:
        return None
    parts, joiners = [last], [""]
    while len(parts) < _MAX_BOXES:
        before = _last_box(text, parts[0][0])
        joiner = _joiner(text, before, parts[0]) if before is not None else None
        if before is None or joiner is None:
            break
        parts, joiners = [before, *parts], ["", joiner, *joiners[1:]]
    contents = [content for _, _, content in parts]
    if len(set(contents)) == 1:
        return contents[0]
    return "".join(joiner + content for joiner, content in zip(joiners, contents, strict=True))


def hedged_box(text: str) -> str | None:
    """Return both numbers where another whole number is offered beside the last box: `41 or \\boxed{42}`; else None."""
    last = _last_box(text, len(text))
    whole = _WHOLE_NUMBER.fullmatch(last[2]) if last is not None else None
    if last is None or whole is None:
        return None
    before = _OR_BEFORE.search(text, max(0, last[0] - _MAX_BESIDE), last[0])
    after = _OR_AFTER.match(text[last[1] : last[1] + _MAX_BESIDE])
    other = before or after
    if other is None or other[1] == whole[1]:
        return None
    return f"{other[1]} or {whole[1]}" if before else f"{whole[1]} or {other[1]}"


def end_of_boxes(text: str) -> int:
    """Return where the last box that is not empty ends; 0 where there is none."""
    last = _last_box(text, len(text))
    return 0 if last is None else last[1]


def _joiner(text: str, first: Box, second: Box) -> str | None:
    """Return what joins two boxes to one answer: " or ", or a comma; None where they are two answers."""
    if first[1] > second[0]:  # one in the other
        return None
    between = text[first[1] : second[0]]
    match = _JOINER.fullmatch(between)
    if match is not None:
        return " or " if match[1] == "or" else ", "
    names = _NAMED.fullmatch(first[2]), _NAMED.fullmatch(second[2])
    if _NEXT_LINE.fullmatch(between) and names[0] is not None and names[1] is not None and names[0][1] != names[1][1]:
        return ", "
    return None


def _last_box(text: str, end: int) -> Box | None:
    """Return start, end and content of the last box before a place that is not empty."""
    for _ in range(_MAX_BOXES):
        start = max(text.rfind(name, 0, end) for name in _NAMES)
        if start < 0:
            return None
        match = _BOX.match(text, start)
        stop, inside = _box_content(text, match.end()) if match is not None else (start, "")
        if inside.strip():
            inner = boxed(inside) if "\\" in inside and _BOX.search(inside) else None
            return start, stop, bound_kept(inner or inside)
        end = start
    return None


def bound_kept(content: str) -> str:
    """Write a leading ">" as LaTeX: elsewhere it is the mark of a quotation."""
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
