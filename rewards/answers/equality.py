"""Equality of expressions: exact for numbers, at several points for expressions with variables."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from alignlab_rewards.answers.evaluation import Evaluator, Value
from alignlab_rewards.answers.exact import NoValue
from alignlab_rewards.answers.expressions import Node
from alignlab_rewards.answers.residues import same_residues

_DIGITS = (50, 100)  # of the two precisions at which inexact numbers are compared
_MAX_SYMBOLS = 12
_CONSTANTS = frozenset(("e", "i", "pi"))


def symbols_of(node: Node) -> frozenset[str]:
    """Return the names of a tree's variables."""
    if node.op == "symbol":
        return frozenset((str(node.value),)) - _CONSTANTS
    return frozenset().union(*(symbols_of(argument) for argument in node.args))


def operations_of(node: Node) -> frozenset[str]:
    """Return the operations of a tree."""
    return frozenset((node.op,)).union(*(operations_of(argument) for argument in node.args))


def equal(first: Node, second: Node, *, relative_tolerance: float = 0.0) -> bool:
    """Return True if two expressions are equal as numbers, or for all values of their variables.

    Exact numbers are compared exactly, irrational ones to 40 digits: a difference counts as none if it is that small or
    shrinks with the precision. Numbers too large to be exact must have the same remainders, too. Expressions with
    variables are compared at points that depend on the names of the variables alone: at positive points, and at points
    of both signs where both sides are real. `log` may be natural or decimal, on both sides.
    """
    if first == second:
        return True
    readings = (False, True) if "log" in operations_of(first) | operations_of(second) else (False,)
    return any(_equal_under(first, second, decimal_log, relative_tolerance) for decimal_log in readings)


def _equal_under(first: Node, second: Node, decimal_log: bool, relative_tolerance: float) -> bool:
    names = sorted(symbols_of(first) | symbols_of(second))
    if len(names) > _MAX_SYMBOLS:
        return False
    compared = 0
    for point, real in _points(names):
        same = _equal_at(first, second, point, real, decimal_log, relative_tolerance)
        if same is False:
            return False
        compared += same is True
    return compared > 0


def _points(names: list[str]) -> Iterator[tuple[dict[str, Fraction], bool]]:
    """Yield values of the variables, and True where only real values are to be compared.

    Points of both signs tell `sqrt(x^2)` from x. There, complex values do not count: `sqrt(x)*sqrt(y)` equals
    `sqrt(x*y)` where both are real.
    """
    if not names:
        yield {}, False
        return
    for round_ in range(6):
        values = {}
        for name in names:
            seed = zlib.crc32(f"{name}/{round_}".encode())
            # Between 1/4 and 3 with a denominator that nothing written has as a factor.
            size = Fraction(seed % 26903 + 2447, 9781)
            values[name] = -size if (round_ >= 3 and seed >> 20 & 1) or round_ == 5 else size
        yield values, round_ >= 3


def _equal_at(
    first: Node, second: Node, point: dict[str, Fraction], real: bool, decimal_log: bool, relative_tolerance: float
) -> bool | None:
    """Compare at one point; None where a side has no value there."""
    differences = []
    for digits in _DIGITS:
        evaluator = Evaluator(digits, _inexact_point(point, digits), decimal_log=decimal_log, real=real)
        try:
            a, b = evaluator.value(first), evaluator.value(second)
        except NoValue:
            return None
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            return a == b or abs(a - b) <= Fraction(relative_tolerance) * abs(a)
        a, b = evaluator.inexact(a), evaluator.inexact(b)
        if evaluator.is_infinite(a, b):
            return bool(a == b)
        difference, scale = abs(a - b), max(abs(a), abs(b))
        if difference <= scale * max(evaluator.context.mpf(10) ** (10 - digits), relative_tolerance):
            return not evaluator.lossy or bool(relative_tolerance) or same_residues(first, second)
        differences.append(difference)
    # A difference that shrinks with the precision comes from rounding.
    return bool(differences[1] < differences[0] * 1e-25)


def _inexact_point(point: dict[str, Fraction], digits: int) -> dict[str, Value]:
    """Return values of limited precision: exact ones would grow with every operation."""
    evaluator = Evaluator(digits)
    return {name: evaluator.inexact(value) for name, value in point.items()}


def proportional(first: Node, second: Node, *, positive: bool = False) -> bool:
    """Return True if one expression is a constant, not 0, times the other, for all values of their variables.

    Args:
        first, second: expressions.
        positive: accept a positive constant only, as for inequalities.
    """
    names = sorted(symbols_of(first) | symbols_of(second))
    if not names or len(names) > _MAX_SYMBOLS:
        return False
    lossy, ratios = _ratios(first, second, names)
    return _is_constant(ratios, positive) and (not lossy or same_residues(first, second))


def _is_constant(ratios: list[Any], positive: bool) -> bool:
    if len(ratios) < 2 or None in ratios or (positive and any(ratio.real <= 0 for ratio in ratios)):
        return False
    return all(abs(ratio - ratios[0]) <= abs(ratios[0]) * 1e-40 for ratio in ratios)


def _ratios(first: Node, second: Node, names: list[str]) -> tuple[bool, list[Any]]:
    """Return True if precision was lost, and first / second at each point where both have a value and are not both 0.

    A ratio is None where one side alone is 0 or infinite.
    """
    ratios: list[Any] = []
    lossy = False
    for point, _ in _points(names):
        evaluator = Evaluator(_DIGITS[1], _inexact_point(point, _DIGITS[1]))
        try:
            a, b = evaluator.inexact(evaluator.value(first)), evaluator.inexact(evaluator.value(second))
        except NoValue:
            continue
        lossy = lossy or evaluator.lossy
        tiny = evaluator.context.mpf(10) ** -80
        zeros = (abs(a) < tiny) + (abs(b) < tiny)
        if zeros < 2:
            ratios.append(None if zeros or evaluator.is_infinite(a, b) else a / b)
    return lossy, ratios


def constant(node: Node) -> Any | None:
    """Return the value of an expression without variables, for ordering; None where it has none or is not real."""
    if symbols_of(node):
        return None
    try:
        value = Evaluator(_DIGITS[0]).value(node)
    except NoValue:
        return None
    return value if isinstance(value, Fraction) else value.real if value.imag == 0 else None
