"""Intervals of real numbers, however they are written: `(0, 1]`, `0 < x <= 1`, `|x| < 3`, `x != 2`, unions of these."""

from __future__ import annotations

from typing import NamedTuple

from alignlab_rewards.answers.equality import constant, symbols_of
from alignlab_rewards.answers.expressions import INFINITY, MINUS_INFINITY, Node, negative
from alignlab_rewards.answers.forms import Answer, Items, Quantity, Relation

FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
ORDERS = frozenset(("<", ">", "<=", ">="))
_BRACKETS = {"<": ("(", ")"), "<=": ("[", "]")}


class Interval(NamedTuple):
    """Two ends, each with its bracket."""

    opening: str
    low: Node
    high: Node
    closing: str


def intervals_of(answer: Answer) -> list[Interval] | None:
    """Return the intervals whose union an answer is; None where it is no such union."""
    if isinstance(answer, Relation):
        return _solutions(answer)
    if not isinstance(answer, Items):
        return None
    return _bracketed(answer) if answer.opening else _union(answer)


def _bracketed(answer: Items) -> list[Interval] | None:
    if answer.opening not in ("(", "[") or answer.closing not in (")", "]") or len(answer.items) != 2:
        return None
    low, high = answer.items
    if not isinstance(low, Quantity) or not isinstance(high, Quantity):
        return None
    return [Interval(answer.opening, low.node, high.node, answer.closing)]


def _union(answer: Items) -> list[Interval] | None:
    # `(1, 2), (3, 4)` is a list of points, but `x < 1, x > 3` and `x < 1 or x > 3` are unions.
    are_relations = answer.joiner in ("or", ",") and all(isinstance(item, Relation) for item in answer.items)
    if answer.joiner != "cup" and not are_relations:
        return None
    intervals: list[Interval] = []
    for item in answer.items:
        item_intervals = intervals_of(item)
        if item_intervals is None:
            return None
        intervals += item_intervals
    return intervals or None


def _solutions(relation: Relation) -> list[Interval] | None:
    """Return the solutions of an inequality in one variable."""
    nodes = [side.node for side in relation.sides if isinstance(side, Quantity)]
    signs = list(relation.signs)
    if len(nodes) != len(relation.sides) or not set(signs) <= ORDERS | {"!="}:
        return None
    if signs[0] in (">", ">="):
        nodes, signs = nodes[::-1], [FLIPPED[sign] for sign in signs[::-1]]
    if len(nodes) == 3:
        return _between(nodes, signs)
    return _bounded(nodes[0], signs[0], nodes[1]) if len(nodes) == 2 else None


def _between(nodes: list[Node], signs: list[str]) -> list[Interval] | None:
    """Return (0, 1] for `0 < x <= 1`."""
    low, name, high = nodes
    if name.op != "symbol" or not set(signs) <= _BRACKETS.keys() or constant(low) is None or constant(high) is None:
        return None
    return [Interval(_BRACKETS[signs[0]][0], low, high, _BRACKETS[signs[1]][1])]


def _bounded(first: Node, sign: str, second: Node) -> list[Interval] | None:
    """Return (-infinity, 3) for `x < 3`, (3, infinity) for `3 < x`."""
    if sign == "!=":
        return _all_but(first, second) if first.op == "symbol" else _all_but(second, first)
    opening, closing = _BRACKETS[sign]
    if first.op == "abs" and not symbols_of(second):
        return _around_center(first.args[0], second, opening, closing)
    if first.op == "symbol" and not symbols_of(second):
        return [Interval("(", MINUS_INFINITY, second, closing)]
    if second.op == "symbol" and not symbols_of(first):
        return [Interval(opening, first, INFINITY, ")")]
    return None


def _all_but(name: Node, value: Node) -> list[Interval] | None:
    """Return the numbers on both sides of 2 for `x != 2`."""
    if name.op != "symbol" or symbols_of(value):
        return None
    return [Interval("(", MINUS_INFINITY, value, ")"), Interval("(", value, INFINITY, ")")]


def _around_center(inside: Node, radius: Node, opening: str, closing: str) -> list[Interval] | None:
    """Return (-3, 3) for `|x| < 3`, (-2, 4) for `|x - 1| < 3`."""
    terms = inside.args if inside.op == "+" else (inside,)
    constants = [term for term in terms if not symbols_of(term)]
    if sum(term.op == "symbol" for term in terms) != 1 or len(constants) + 1 != len(terms):
        return None
    low, high = (Node("+", (end, *map(negative, constants))) for end in (negative(radius), radius))
    return [Interval(opening, low, high, closing)]
