"""Quantities: a number or an expression with a currency, a percent sign or a unit around it."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from fractions import Fraction

from alignlab_rewards.answers.equality import operations_of, symbols_of
from alignlab_rewards.answers.expressions import Node, number, read_expression
from alignlab_rewards.answers.forms import Quantity
from alignlab_rewards.answers.tokens import FUNCTIONS, NotMathematics
from alignlab_rewards.answers.units import CURRENCIES, Unit, read_scale, read_unit

_MAX_CUTS = 12
# "about 5", "only 5", "= 5".
_BEFORE = re.compile(
    r"^(?:(?:about|approximately|approx\.?|roughly|exactly"
    r"|only|just|around|nearly|almost|equals?|a total of|\\approx|\\sim|[=:≈~])\s*)+",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"\s*(?:%|per\s?cent|pct)$", re.IGNORECASE)
# "$5", "-US$5"; behind the number, "5 €".
_CURRENCY_FIRST = re.compile(r"^([-+]?)\s*(?:US|USD|CA|A)?\s*([$€£¥₹])\s*(?=[-+\d.\\(])")
_CURRENCY_LAST = re.compile(r"(?<=[\d.)}])\s*([$€£¥₹])$")
# Where a unit may begin: at a letter or a command, "-" in front of it included.
_CUT = re.compile(r"\s*-?(?=(?:\\circ|[A-Za-z]))|\s+(?=\\)")
# "2 hours and" of "2 hours and 30 minutes".
_PART = re.compile(r"(-?\d[\d,]*(?:\.\d+)?(?:\s\d+/\d+)?)\s*([A-Za-z]+|\\circ|')\s*(?:,|and\s)?\s*")


def read_quantity(text: str, prose: bool) -> Quantity:
    """Return what a text says as one quantity.

    Args:
        text: plain notation.
        prose: unknown runs of letters are words, not products.

    Raises:
        NotMathematics: for any other text.
    """
    text = _BEFORE.sub("", text).strip()
    first = _CURRENCY_FIRST.match(text)
    if first is not None:
        amount = read_quantity(first[1] + text[first.end() :], prose)
        return Quantity(amount.node, _currency(first[2]))
    last = _CURRENCY_LAST.search(text)
    if last is not None:
        return Quantity(read_expression(text[: last.start()], letters=False), _currency(last[1]))
    percent = _PERCENT.search(text)
    if percent is not None and percent.start():
        return Quantity(read_expression(text[: percent.start()], letters=False), percent=True)
    # "5 m" is five meters before it is a product, and "5 x" a product before it is five of something.
    quantity = _with_unit(text, measured=True) or _bare(text, prose) or _with_unit(text, measured=False)
    if quantity is None:
        raise NotMathematics(f"no quantity: {text[:60]!r}")
    return quantity


def read_compound(text: str) -> Quantity | None:
    """Return the sum of `2 hours 30 minutes` or `5 ft 4 in`, in its last unit; None for any other text."""
    position, total = 0, Fraction(0)
    units: list[Unit] = []
    while position < len(text):
        match = _PART.match(text, position)
        unit = read_unit(match[2]) if match is not None else None
        if match is None or unit is None or not unit.known or not _may_follow(units, unit):
            return None
        amount = read_expression(match[1]).value
        if not isinstance(amount, Fraction):
            return None
        total += amount * unit.factor
        position = match.end()
        units.append(unit)
    return Quantity(number(total / units[-1].factor), units[-1]) if len(units) > 1 else None


def _may_follow(units: list[Unit], unit: Unit) -> bool:
    """Return True for minutes behind hours: each unit is a smaller one of the same dimension."""
    return not units or (unit.dimensions == units[-1].dimensions and unit.factor < units[-1].factor)


def _currency(sign: str) -> Unit:
    return Unit(((CURRENCIES[sign], 1),))


def _bare(text: str, prose: bool) -> Quantity | None:
    try:
        return Quantity(read_expression(text, letters=not prose))
    except NotMathematics:
        return None


def _with_unit(text: str, measured: bool) -> Quantity | None:
    """Return an expression and the unit behind it; None where no cut of the text gives both.

    Args:
        text: plain notation.
        measured: ask for a unit of measure, or a scale such as "million"; else any words may say what was counted.
    """
    for cut in itertools.islice(_cuts(text), _MAX_CUTS):
        behind = _read_behind(text, cut, measured)
        node = _without_variables(text[:cut], behind[1]) if behind is not None else None
        if behind is not None and node is not None:
            scale, unit = behind
            return Quantity(Node("*", (node, number(scale))) if scale else node, unit)
    return None


def _read_behind(text: str, cut: int, measured: bool) -> tuple[int | None, Unit] | None:
    """Return the scale and the unit behind a cut: (1000000, dollars) for "5 million dollars"."""
    behind = text[cut:].strip(" -")
    first_word, _, remaining = behind.partition(" ")
    scale = read_scale(first_word)
    unit = read_unit(remaining if scale else behind)
    if unit is None or (measured and not unit.known and not scale):
        return None
    if len(behind) == 1 and not (unit.known and _is_spaced(text, cut)):
        return None
    return scale, unit


def _is_spaced(text: str, cut: int) -> bool:
    """Return True for `5 m`; the letter of `5m` is a variable."""
    return text[cut - 1 : cut] == " " or text[cut].isspace()


def _without_variables(text: str, unit: Unit) -> Node | None:
    """Return the expression in front of a unit; None where it has variables, or takes the unit as its argument."""
    try:
        node = read_expression(text, letters=False)
    except NotMathematics:
        return None
    takes_unit = unit.measures_angles and operations_of(node) & FUNCTIONS  # the degrees of `sin 30 degrees`
    return None if symbols_of(node) or takes_unit else node


def _cuts(text: str) -> Iterator[int]:
    for match in _CUT.finditer(text):
        start = match.start()
        begins_word = start and text[start - 1] != "\\" and not text[start - 1].isalpha()
        if begins_word or match.end() > start > 0:
            yield start
