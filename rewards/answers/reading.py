"""What an answer's text says: a quantity, a list, an interval, a relation, a ratio, a matrix, or words."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction

from alignlab_rewards.answers.brackets import encloses, separators, split
from alignlab_rewards.answers.equality import constant, operations_of, symbols_of
from alignlab_rewards.answers.expressions import Node, read_expression
from alignlab_rewards.answers.forms import Answer, Items, Matrix, Quantity, Ratio, Relation, Words
from alignlab_rewards.answers.markup import ROW_BREAK, plain_notation, words
from alignlab_rewards.answers.tokens import FUNCTIONS, NotMathematics
from alignlab_rewards.answers.units import CURRENCIES, Unit, read_scale, read_unit

MAX_LENGTH = 2000
MAX_ITEMS = 64
_MAX_NESTING = 5


_BEFORE = re.compile(
    r"^(?:(?:about|approximately|approx\.?|roughly|exactly"
    r"|only|just|around|nearly|almost|equals?|a total of|\\approx|\\sim|[=:≈~])\s*)+",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"\s*(?:%|per\s?cent|pct)$", re.IGNORECASE)
_CURRENCY_FIRST = re.compile(r"^([-+]?)\s*(?:US|USD|CA|A)?\s*([$€£¥₹])\s*(?=[-+\d.\\(])")
_CURRENCY_LAST = re.compile(r"(?<=[\d.)}])\s*([$€£¥₹])$")
_CUT = re.compile(r"\s*-?(?=(?:\\circ|[A-Za-z]))|\s+(?=\\)")
_PART = re.compile(r"(-?\d[\d,]*(?:\.\d+)?(?:\s\d+/\d+)?)\s*([A-Za-z]+|\\circ|')\s*(?:,|and\s)?\s*")
_WORD_JOINER = re.compile(r"\b(?:and|or)\b|&")
_LOGIC = re.compile(r"\\l(?:or|and)(?![A-Za-z])")
_SIGN = re.compile(r"\\(?:le|ge|ne|in|approx|equiv|Rightarrow|sim)(?![A-Za-z])|[<>=]")
_SIGN_NAMES = {
    "\\le": "<=",
    "\\ge": ">=",
    "\\ne": "!=",
    "\\in": "in",
    "\\approx": "~",
    "\\sim": "~",
    "\\equiv": "=",
    "\\Rightarrow": "=>",
}
_CLOCK = re.compile(r"[0-2]?\d:[0-5]\d(?::[0-5]\d)?")
_CLOCK_HALF = re.compile(r"(\d{1,2}(?::\d{2})?(?::\d{2})?)\s*([ap])\.?\s?m\b\.?", re.IGNORECASE)
_LINES = re.compile(r"\\begin\s?\{(cases|aligned|align\*?|alignedat|gathered|split)\}(.*)\\end\s?\{\1\}", re.DOTALL)
_MATRIX = re.compile(
    r"^\\begin\s?\{([bpvBV]?matrix|smallmatrix|array)\}(?:\s?\{[lcr| ]{0,40}\})?(.*)\\end\s?\{\1\}$", re.DOTALL
)
_BUILDER = re.compile(r"^\s*\\?[A-Za-z]+\s*(?:\\in\s*\\mathbb\s?\{[A-Z]\}\s*)?(?:\||:)\s*(.+)$", re.DOTALL)
_MEMBER = re.compile(r"^\s*\(?[A-Za-z](?:\s*,\s*[A-Za-z])*\)?\s*\\in(?![A-Za-z])\s*(.+)$", re.DOTALL)
_REALS = re.compile(r"^(?:\\mathbb\s?\{?R\}?|(?:all|any|every) real(?: number)?s?|reals)$", re.IGNORECASE)
_ALL_BUT = re.compile(r"^\\mathbb\s?\{?R\}?\s*(?:\\setminus|\\backslash|-)\s*\\\{(.+)\\\}$")
_EMPTY = re.compile(r"^(?:\\emptyset|\\\{\s*\\\}|(?:the )?empty set)$", re.IGNORECASE)
_POINT_NAME = re.compile(r"^[A-Z]\s?(?=\([^()]*,[^()]*\)$)")
_OPENINGS = {"(": ")]", "[": ")]", "\\{": ("\\}",), "\\langle": ("\\rangle",), "]": "[]", "{": "}"}
_INFINITY = Quantity(Node("infinity"))
_MINUS_INFINITY = Quantity(Node("-", (Node("infinity"),)))
REALS = Items((_MINUS_INFINITY, _INFINITY), "(", ")")


def read_answer(text: str, *, prose: bool = False) -> Answer:
    """Return what a text says as an answer; Words where it is no mathematics that this reader knows.

    Args:
        text: the answer alone, as it was written.
        prose: the text is part of a sentence: unknown runs of letters and lists of counted things are no mathematics.
    """
    if len(text) > MAX_LENGTH:
        return Words(text[:MAX_LENGTH])
    plain = plain_notation(text)
    plain = re.sub(r"\s*[.,;:]+$", "", plain)
    plain = re.sub(r"(?<=\d)\s+of (?:them|these|those|it)$", "", plain)
    try:
        return _read(plain, prose, 0)
    except NotMathematics:
        return Words(words(text))


def is_mathematics(answer: Answer) -> bool:
    """Return True if no part of an answer is words."""
    if isinstance(answer, Words):
        return False
    if isinstance(answer, Items):
        return all(map(is_mathematics, answer.items))
    if isinstance(answer, Relation):
        return all(map(is_mathematics, answer.sides[1:]))
    return not isinstance(answer, Matrix) or all(is_mathematics(cell) for row in answer.rows for cell in row)


def _read(text: str, prose: bool, depth: int) -> Answer:
    """Try each form in turn; the first that fits the whole text is the answer."""
    if depth > _MAX_NESTING or not text.strip():
        raise NotMathematics("empty, or nested too deep")
    text = text.strip()
    for form in (
        _special,
        _layout,
        _matrix,
        _compound,
        _plus_minus,
        _logical,
        _without_points,
        _union,
        _member,
        _list,
        _bracketed,
        _relation,
        _ratio,
    ):
        answer = form(text, prose, depth)
        if answer is not None:
            return answer
    return _quantity(text, prose)


def _special(text: str, prose: bool, depth: int) -> Answer | None:
    half = _CLOCK_HALF.fullmatch(text)
    if half is not None:
        return Words(f"{half[1].removesuffix(':00')} {half[2].casefold()}m")
    if _REALS.match(text):
        return REALS
    return Items((), "{", "}") if _EMPTY.match(text) else None


def _layout(text: str, prose: bool, depth: int) -> Answer | None:
    """Aligned lines and systems of equations: lines that go on with "=" are one chain, others a list."""
    match = _LINES.fullmatch(text)
    if match is None:
        return None
    lines = [re.sub(r"\s*&\s*", " ", line).strip(" ,") for line in match[2].split(ROW_BREAK)]
    joined = ""
    for line in filter(None, lines):
        joined += f" {line}" if line.startswith("=") or not joined else f", {line}"
    if match[1] == "cases" and not all("=" in line for line in lines if line):
        raise NotMathematics("a function in pieces")
    return _read(joined, prose, depth + 1)


def _matrix(text: str, prose: bool, depth: int) -> Answer | None:
    match = _MATRIX.match(text)
    if match is None:
        return None
    rows = [row for row in match[2].split(ROW_BREAK) if row.strip()]
    if len(rows) * max((row.count("&") for row in rows), default=0) > MAX_ITEMS:
        raise NotMathematics("too large a matrix")
    return Matrix(tuple(tuple(_read(cell, False, depth + 1) for cell in row.split("&")) for row in rows))


def _compound(text: str, prose: bool, depth: int) -> Answer | None:
    """`2 hours 30 minutes`, `5 ft 4 in`: a sum of one dimension, from the larger unit to the smaller."""
    position, total, last = 0, Fraction(0), None
    count = 0
    while position < len(text):
        match = _PART.match(text, position)
        unit = read_unit(match[2]) if match is not None else None
        if match is None or unit is None or not unit.known:
            return None
        if last is not None and (unit.dimensions != last.dimensions or unit.factor >= last.factor):
            return None
        number = read_expression(match[1]).value
        if not isinstance(number, Fraction):
            return None
        total, last, position, count = total + number * unit.factor, unit, match.end(), count + 1
    if last is None or count < 2:
        return None
    return Quantity(Node("number", value=total / last.factor), last)


def _plus_minus(text: str, prose: bool, depth: int) -> Answer | None:
    if "\\pm" not in text:
        return None
    if text.count("\\pm") > 2:
        raise NotMathematics("too many signs")
    plus = text.replace("\\pm", "+").replace("\\mp", "-")
    minus = text.replace("\\pm", "-").replace("\\mp", "+")
    return Items((_read(plus, prose, depth + 1), _read(minus, prose, depth + 1)), joiner="or")


def _logical(text: str, prose: bool, depth: int) -> Answer | None:
    r"""`x < 1 \lor x > 3`: relations joined by a sign of logic, which joins nothing else that is mathematics."""
    parts = split(text, _LOGIC)
    if len(parts) < 2:
        return None
    relations = tuple(_read(part, prose, depth + 1) for part in parts[:MAX_ITEMS])
    joiners = set(separators(text, _LOGIC))
    if len(joiners) > 1 or not all(isinstance(relation, Relation) for relation in relations):
        raise NotMathematics("signs of logic")
    return Items(relations, joiner="or" if joiners == {"\\lor"} else "and")


def _union(text: str, prose: bool, depth: int) -> Answer | None:
    parts = split(text, re.compile(r"\\cup(?![A-Za-z])"))
    if len(parts) < 2:
        return None
    return Items(tuple(_read(part, prose, depth + 1) for part in parts), joiner="cup")


def _without_points(text: str, prose: bool, depth: int) -> Answer | None:
    """All real numbers but some: a union of intervals."""
    match = _ALL_BUT.match(text)
    if match is None:
        return None
    points = [_quantity(part, False) for part in _separated(match[1], inside_brackets=True)[0]]
    values = {constant(point.node): point for point in points}
    if None in values or len(values) > MAX_ITEMS:
        return None
    ends = [_MINUS_INFINITY, *(values[value] for value in sorted(values)), _INFINITY]
    return Items(tuple(Items(pair, "(", ")") for pair in itertools.pairwise(ends)), joiner="cup")


def _member(text: str, prose: bool, depth: int) -> Answer | None:
    match = _MEMBER.match(text)
    return None if match is None else _read(match[1], prose, depth + 1)


def _list(text: str, prose: bool, depth: int) -> Answer | None:
    parts, joiner = _separated(text)
    if len(parts) < 2:
        return None
    return Items(_items(parts, prose, depth), joiner=joiner)


def _separated(text: str, inside_brackets: bool = False) -> tuple[list[str], str]:
    """Split a list at its semicolons, else at its commas and the words between its items."""
    parts = split(text, re.compile(";"))
    if len(parts) > 1:
        return parts, ";"
    thousands = not inside_brackets or ", " in text
    comma = re.compile(r",(?!\d{3}(?!\d))|(?<!\d)," if thousands else ",")
    joiner = "or" if split(text, re.compile(r"\bor\b"))[1:] else "and" if split(text, _WORD_JOINER)[1:] else ","
    parts = [piece for part in split(text, comma) for piece in split(part, _WORD_JOINER)]
    return [
        part
        for part in (
            re.sub(r"^(?:(?:either|both|maybe|perhaps|possibly|even)\s+)+", "", part.strip()) for part in parts
        )
        if part
    ], joiner


def _items(parts: list[str], prose: bool, depth: int) -> tuple[Answer, ...]:
    if len(parts) > MAX_ITEMS:
        raise NotMathematics("too many items")
    items = []
    for part in parts:
        try:
            item: Answer = _read(part, prose, depth + 1)
        except NotMathematics:
            if prose:
                raise
            item = Words(words(part))
        if prose and isinstance(item, Quantity) and item.unit.counted:
            raise NotMathematics("a list of counted things in a sentence")
        items.append(item)
    return tuple(items)


def _bracketed(text: str, prose: bool, depth: int) -> Answer | None:
    """`(1, 2)`, `[1, 2)`, `\\{1, 2\\}`: brackets around the whole."""
    text = _POINT_NAME.sub("", text)
    opening = next((bracket for bracket in _OPENINGS if text.startswith(bracket)), None)
    if opening is None:
        return None
    closing = next((bracket for bracket in _OPENINGS[opening] if text.endswith(bracket)), None)
    if closing is None or not encloses(text, opening, closing):
        return None
    inside = text[len(opening) : len(text) - len(closing)].strip()
    is_set = opening in ("\\{", "{")
    builder = _BUILDER.match(inside) if is_set else None
    if builder is not None:
        return _read(builder[1], prose, depth + 1)
    parts, _ = _separated(inside, inside_brackets=True)
    if len(parts) < 2 and not (opening == "\\{" and parts):
        return _read(inside, prose, depth + 1) if is_set else None
    opening, closing = (
        {"]": "(", "\\{": "{", "\\langle": "("}.get(opening, opening),
        {"[": ")", "\\}": "}", "\\rangle": ")"}.get(closing, closing),
    )
    return Items(_items(parts, False, depth), opening, closing)


def _relation(text: str, prose: bool, depth: int) -> Answer | None:
    pieces = split(text, _SIGN)
    if len(pieces) < 2:
        return None
    signs = tuple(_SIGN_NAMES.get(sign, sign) for sign in separators(text, _SIGN))
    if "=>" in signs:
        return _read(
            pieces[len(signs) - signs[::-1].index("=>")] if len(pieces) == 2 else text.rsplit("\\Rightarrow", 1)[1],
            prose,
            depth + 1,
        )
    if len(pieces) > 8:
        raise NotMathematics("too long a chain")
    if not pieces[0].strip():  # "= 5"
        if signs[0] not in ("=", "~"):
            raise NotMathematics("a bound of nothing")
        return _read(text[text.index(pieces[1]) :], prose, depth + 1)
    sides: list[Answer] = [_first_side(pieces[0], prose, depth)]
    sides += [_read(piece, prose, depth + 1) for piece in pieces[1:]]
    return Relation(tuple(sides), signs)


def _first_side(text: str, prose: bool, depth: int) -> Answer:
    try:
        return _read(text, prose, depth + 1)
    except NotMathematics:
        if prose:
            raise
        return Words(words(text))


def _ratio(text: str, prose: bool, depth: int) -> Answer | None:
    parts = split(text, re.compile(":"))
    if len(parts) < 2 or len(parts) > 6:
        parts = re.split(r"(?<=\d)\s*\bto\b\s*(?=\d)", text)
    if not 2 <= len(parts) <= 6:
        return None
    quantities = [_read(part, prose, depth + 1) for part in parts]
    if not all(isinstance(quantity, Quantity) for quantity in quantities):
        raise NotMathematics("no ratio")
    return Ratio(
        tuple(quantity for quantity in quantities if isinstance(quantity, Quantity)), _CLOCK.fullmatch(text) is not None
    )


def _quantity(text: str, prose: bool) -> Quantity:
    """A number or expression with what stands around it: a currency, a percent sign, a unit."""
    text = _BEFORE.sub("", text).strip()
    currency = _CURRENCY_FIRST.match(text)
    if currency is not None:
        inside = _quantity(currency[1] + text[currency.end() :], prose)
        return Quantity(inside.node, _currency(currency[2]))
    last = _CURRENCY_LAST.search(text)
    if last is not None:
        return Quantity(read_expression(text[: last.start()], letters=False), _currency(last[1]))
    percent = _PERCENT.search(text)
    if percent is not None and percent.start():
        return Quantity(read_expression(text[: percent.start()], letters=False), percent=True)
    for measured in (True, False):
        with_unit = _with_unit(text, measured)
        if with_unit is not None:
            return with_unit
        if measured:
            try:
                return Quantity(read_expression(text, letters=not prose))
            except NotMathematics:
                continue
    raise NotMathematics(f"no quantity: {text[:60]!r}")


def _currency(sign: str) -> Unit:
    return Unit(((CURRENCIES[sign], 1),))


def _with_unit(text: str, measured: bool) -> Quantity | None:
    """Read a number and a unit; `measured` asks for a known unit, which a single letter is behind a space only."""
    for cut in list(_cuts(text))[:12]:
        rest = text[cut:].strip(" -")
        first, _, remaining = rest.partition(" ")
        scale = read_scale(first)
        unit = read_unit(remaining if scale else rest)
        if unit is None or (measured and not unit.known and not scale):
            continue
        if len(rest) == 1 and text[cut - 1 : cut] != " " and not text[cut].isspace():
            continue
        if len(rest) == 1 and not unit.known:
            continue
        try:
            node = read_expression(text[:cut], letters=False)
        except NotMathematics:
            continue
        if symbols_of(node) or (unit.measures_angles and operations_of(node) & FUNCTIONS):
            continue
        if scale:
            node = Node("*", (node, Node("number", value=Fraction(scale))))
        return Quantity(node, unit)
    return None


def _cuts(text: str) -> Iterator[int]:
    for match in _CUT.finditer(text):
        if (
            match.start() and text[match.start() - 1] not in "\\" and not text[match.start() - 1].isalpha()
        ) or match.end() > match.start() > 0:
            yield match.start()
