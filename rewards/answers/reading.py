"""Read an answer's text: a quantity, a list, an interval, a relation, a ratio, a matrix, or words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

from alignlab_rewards.answers.brackets import encloses, separators, split
from alignlab_rewards.answers.equality import constant
from alignlab_rewards.answers.expressions import INFINITY, MINUS_INFINITY
from alignlab_rewards.answers.forms import REALS, Answer, Items, Matrix, Quantity, Ratio, Relation, Words
from alignlab_rewards.answers.markup import ROW_BREAK, plain_notation, words
from alignlab_rewards.answers.quantities import read_compound, read_quantity
from alignlab_rewards.answers.tokens import NotMathematics

MAX_LENGTH = 2000
MAX_ITEMS = 64
_MAX_NESTING, _MAX_CHAIN, _MAX_RATIO = 5, 8, 6

_WORD_JOINER = re.compile(r"\b(?:and|or)\b|&")
_OR = re.compile(r"\bor\b")
_SEMICOLON, _COLON, _COMMA = re.compile(";"), re.compile(":"), re.compile(",")
_CUP = re.compile(r"\\cup(?![A-Za-z])")
# "1,234" is one number.
_COMMA_OF_LIST = re.compile(r",(?!\d{3}(?!\d))|(?<!\d),")
_HEDGES = re.compile(r"^(?:(?:either|both|maybe|perhaps|possibly|even)\s+)+")
_TO = re.compile(r"(?<=\d)\s*\bto\b\s*(?=\d)")
_LOGIC = re.compile(r"\\l(?:or|and)(?![A-Za-z])")
_SIGN = re.compile(r"\\(?:le|ge|ne|in|approx|equiv|Rightarrow|sim)(?![A-Za-z])|[<>=]")
_SIGN_NAMES = {
    "\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\in": "in", "\\approx": "~", "\\sim": "~", "\\equiv": "=",
    "\\Rightarrow": "=>",
}  # fmt: skip
_CLOCK = re.compile(r"[0-2]?\d:[0-5]\d(?::[0-5]\d)?")
# "3:30 p.m.".
_CLOCK_HALF = re.compile(r"(\d{1,2}(?::\d{2})?(?::\d{2})?)\s*([ap])\.?\s?m\b\.?", re.IGNORECASE)
_LINES = re.compile(r"\\begin\s?\{(cases|aligned|align\*?|alignedat|gathered|split)\}(.*)\\end\s?\{\1\}", re.DOTALL)
_MATRIX = re.compile(
    r"^\\begin\s?\{([bpvBV]?matrix|smallmatrix|array)\}(?:\s?\{[lcr| ]{0,40}\})?(.*)\\end\s?\{\1\}$", re.DOTALL
)
# `x \in \mathbb{R} : x < 2` and `x | x < 2` inside braces.
_BUILDER = re.compile(r"^\s*\\?[A-Za-z]+\s*(?:\\in\s*\\mathbb\s?\{[A-Z]\}\s*)?(?:\||:)\s*(.+)$", re.DOTALL)
_MEMBER = re.compile(r"^\s*\(?[A-Za-z](?:\s*,\s*[A-Za-z])*\)?\s*\\in(?![A-Za-z])\s*(.+)$", re.DOTALL)
_REALS = re.compile(r"^(?:\\mathbb\s?\{?R\}?|(?:all|any|every) real(?: number)?s?|reals)$", re.IGNORECASE)
_ALL_BUT = re.compile(r"^\\mathbb\s?\{?R\}?\s*(?:\\setminus|\\backslash|-)\s*\\\{(.+)\\\}$")
_EMPTY = re.compile(r"^(?:\\emptyset|\\\{\s*\\\}|(?:the )?empty set)$", re.IGNORECASE)
# "P(1, 2)" is the point (1, 2).
_POINT_NAME = re.compile(r"^[A-Z]\s?(?=\([^()]*,[^()]*\)$)")
# Each opening bracket with its closing ones; a vector in angles is a tuple.
_CLOSINGS = {"(": ")]", "[": ")]", "\\{": ("\\}",), "\\langle": ("\\rangle",), "{": "}"}
_PLAIN_OPENINGS = {"\\{": "{", "\\langle": "("}
_PLAIN_CLOSINGS = {"\\}": "}", "\\rangle": ")"}
# "]0, 1[" or a union of such intervals, as it is written in French: a bracket that is turned away leaves its end out.
_TURNED = re.compile(r"([\[\]])([^\[\](),;]+[,;][^\[\](),;]+)([\[\]])")
_INTERVALS = re.compile(rf"(?:[A-Za-z]\s*\\in\s*)?{_TURNED.pattern}(?:\s*\\cup\s*{_TURNED.pattern}){{0,8}}")


def read_answer(text: str, *, prose: bool = False) -> Answer:
    """Return what a text says as an answer; Words where it is no mathematics that this reader knows.

    Args:
        text: the answer alone, as it was written.
        prose: the text is piece of a sentence: unknown runs of letters and lists of counted things are no mathematics.
    """
    if len(text) > MAX_LENGTH:
        return Words(text[:MAX_LENGTH])
    plain = re.sub(r"\s*[.,;:]+$", "", plain_notation(text))
    if _INTERVALS.fullmatch(plain):
        plain = _TURNED.sub(_turned_back, plain)
    plain = re.sub(r"(?<=\d)\s+of (?:them|these|those|it)$", "", plain)
    try:
        return _read(plain, prose, 0)
    except NotMathematics:
        return Words(words(text))


def _read(text: str, prose: bool, depth: int) -> Answer:
    """Try each form in turn; the first that fits the whole text is the answer."""
    text = text.strip()
    if depth > _MAX_NESTING or not text:
        raise NotMathematics("empty, or nested too deep")
    for form in _FORMS:
        answer = form(text, prose, depth + 1)
        if answer is not None:
            return answer
    return read_quantity(text, prose)


def _turned_back(interval: re.Match[str]) -> str:
    return f"{'(' if interval[1] == ']' else '['}{interval[2]}{')' if interval[3] == '[' else ']'}"


def _named(text: str, prose: bool, depth: int) -> Answer | None:
    """Read the names of sets, `all real numbers`, and a time of day, `3 p.m.`."""
    time = _CLOCK_HALF.fullmatch(text)
    if time is not None:
        return Words(f"{time[1].removesuffix(':00')} {time[2].casefold()}m")
    if _REALS.match(text):
        return REALS
    return Items((), "{", "}") if _EMPTY.match(text) else None


def _layout(text: str, prose: bool, depth: int) -> Answer | None:
    """Read aligned lines and systems of equations: a line that begins with "=" goes on with the chain above it."""
    match = _LINES.fullmatch(text)
    if match is None:
        return None
    lines = [re.sub(r"\s*&\s*", " ", line).strip(" ,") for line in match[2].split(ROW_BREAK)]
    lines = [line for line in lines if line]
    if match[1] == "cases" and not all("=" in line for line in lines):
        raise NotMathematics("a function in pieces")
    joined = "".join(f" {line}" if line.startswith("=") or i == 0 else f", {line}" for i, line in enumerate(lines))
    return _read(joined, prose, depth)


def _matrix(text: str, prose: bool, depth: int) -> Answer | None:
    match = _MATRIX.match(text)
    if match is None:
        return None
    rows = [row for row in match[2].split(ROW_BREAK) if row.strip()]
    if len(rows) * max((row.count("&") for row in rows), default=0) > MAX_ITEMS:
        raise NotMathematics("too large a matrix")
    return Matrix(tuple(tuple(_read(cell, False, depth) for cell in row.split("&")) for row in rows))


def _compound(text: str, prose: bool, depth: int) -> Answer | None:
    return read_compound(text)


def _plus_minus(text: str, prose: bool, depth: int) -> Answer | None:
    r"""Read `1 \pm \sqrt{2}` as two answers."""
    if "\\pm" not in text:
        return None
    if text.count("\\pm") > 2:
        raise NotMathematics("too many signs")
    signs = (("+", "-"), ("-", "+"))
    return Items(
        tuple(_read(text.replace("\\pm", pm).replace("\\mp", mp), prose, depth) for pm, mp in signs), joiner="or"
    )


def _logical(text: str, prose: bool, depth: int) -> Answer | None:
    r"""Read relations joined by a sign of logic: `x < 1 \lor x > 3`."""
    pieces = split(text, _LOGIC)
    if len(pieces) < 2:
        return None
    relations = tuple(_read(piece, prose, depth) for piece in pieces[:MAX_ITEMS])
    joiners = set(separators(text, _LOGIC))
    if len(joiners) > 1 or not all(isinstance(relation, Relation) for relation in relations):
        raise NotMathematics("signs of logic")
    return Items(relations, joiner="or" if joiners == {"\\lor"} else "and")


def _without_points(text: str, prose: bool, depth: int) -> Answer | None:
    r"""Read all real numbers but some, `\mathbb{R} \setminus \{1, 2\}`, as a union of intervals."""
    match = _ALL_BUT.match(text)
    if match is None:
        return None
    points = [read_quantity(piece, False) for piece in _separated(match[1], inside_brackets=True)[0]]
    values = {constant(point.node): point for point in points}
    if None in values or len(values) > MAX_ITEMS:
        return None
    ends = [Quantity(MINUS_INFINITY), *(values[value] for value in sorted(values)), Quantity(INFINITY)]
    return Items(tuple(Items(pair, "(", ")") for pair in itertools.pairwise(ends)), joiner="cup")


def _union(text: str, prose: bool, depth: int) -> Answer | None:
    pieces = split(text, _CUP)
    return Items(tuple(_read(piece, prose, depth) for piece in pieces), joiner="cup") if len(pieces) > 1 else None


def _member(text: str, prose: bool, depth: int) -> Answer | None:
    r"""Read `x \in (0, 1)` as the set."""
    match = _MEMBER.match(text)
    return None if match is None else _read(match[1], prose, depth)


def _list(text: str, prose: bool, depth: int) -> Answer | None:
    pieces, joiner = _separated(text)
    return Items(_items(pieces, prose, depth), joiner=joiner) if len(pieces) > 1 else None


def _separated(text: str, inside_brackets: bool = False) -> tuple[list[str], str]:
    """Split a list at its semicolons, else at its commas and the words between its items; return the joiner, too."""
    pieces = split(text, _SEMICOLON)
    if len(pieces) > 1:
        return pieces, ";"
    # In `(1,234)` the comma stands between two numbers.
    comma = _COMMA if inside_brackets and ", " not in text else _COMMA_OF_LIST
    joiner = "or" if len(split(text, _OR)) > 1 else "and" if len(split(text, _WORD_JOINER)) > 1 else ","
    pieces = [_HEDGES.sub("", item.strip()) for piece in split(text, comma) for item in split(piece, _WORD_JOINER)]
    return [piece for piece in pieces if piece], joiner


def _items(pieces: list[str], prose: bool, depth: int) -> tuple[Answer, ...]:
    if len(pieces) > MAX_ITEMS:
        raise NotMathematics("too many items")
    items = tuple(_read_or_words(piece, prose, depth) for piece in pieces)
    if prose and any(isinstance(item, Quantity) and item.unit.counted for item in items):
        raise NotMathematics("a list of counted things in a sentence")
    return items


def _read_or_words(text: str, prose: bool, depth: int) -> Answer:
    try:
        return _read(text, prose, depth)
    except NotMathematics:
        if prose:
            raise
        return Words(words(text))


def _bracketed(text: str, prose: bool, depth: int) -> Answer | None:
    r"""Read brackets around the whole: `(1, 2)`, `[1, 2)`, `\{1, 2\}`, `\{x : x < 2\}`."""
    text = _POINT_NAME.sub("", text)
    opening, closing = _brackets_around(text)
    if not closing:
        return None
    inside = text[len(opening) : len(text) - len(closing)].strip()
    is_set = opening in ("\\{", "{")
    builder = _BUILDER.match(inside) if is_set else None
    if builder is not None:
        return _read(builder[1], prose, depth)
    pieces, _ = _separated(inside, inside_brackets=True)
    if len(pieces) > 1 or (opening == "\\{" and pieces):
        brackets = _PLAIN_OPENINGS.get(opening, opening), _PLAIN_CLOSINGS.get(closing, closing)
        return Items(_items(pieces, False, depth), *brackets)
    return _read(inside, prose, depth) if is_set else None  # the braces of LaTeX around one number


def _brackets_around(text: str) -> tuple[str, str]:
    """Return the brackets around the whole text; empty ones where it has none."""
    opening = next((bracket for bracket in _CLOSINGS if text.startswith(bracket)), "")
    closing = next((bracket for bracket in _CLOSINGS.get(opening, ()) if text.endswith(bracket)), "")
    return (opening, closing) if closing and encloses(text) else ("", "")


def _relation(text: str, prose: bool, depth: int) -> Answer | None:
    pieces = split(text, _SIGN)
    if len(pieces) < 2:
        return None
    signs = tuple(_SIGN_NAMES.get(sign, sign) for sign in separators(text, _SIGN))
    if "=>" in signs:
        return _read(pieces[1] if len(pieces) == 2 else text.rsplit("\\Rightarrow", 1)[1], prose, depth)
    if len(pieces) > _MAX_CHAIN:
        raise NotMathematics("too long a chain")
    if not pieces[0].strip():  # "= 5"
        if signs[0] not in ("=", "~"):
            raise NotMathematics("a bound of nothing")
        return _read(text[text.index(pieces[1]) :], prose, depth)
    name = _read_or_words(pieces[0], prose, depth)
    return Relation((name, *(_read(piece, prose, depth) for piece in pieces[1:])), signs)


def _ratio(text: str, prose: bool, depth: int) -> Answer | None:
    """Read `3:4` and `3 to 4`."""
    pieces = split(text, _COLON)
    if not 2 <= len(pieces) <= _MAX_RATIO:
        pieces = _TO.split(text)
    if not 2 <= len(pieces) <= _MAX_RATIO:
        return None
    answers = [_read(piece, prose, depth) for piece in pieces]
    quantities = tuple(answer for answer in answers if isinstance(answer, Quantity))
    if len(quantities) < len(answers):
        raise NotMathematics("no ratio")
    return Ratio(quantities, _CLOCK.fullmatch(text) is not None)


_FORMS: tuple[Callable[[str, bool, int], Answer | None], ...] = (
    _named, _layout, _matrix, _compound, _plus_minus, _logical, _without_points, _union, _member, _list, _bracketed,
    _relation, _ratio,
)  # fmt: skip
