"""Compare two answers that were read: the expected one and one of a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import TypeGuard

from alignlab_rewards.answers.equality import constant, equal, proportional, symbols_of
from alignlab_rewards.answers.expressions import Node
from alignlab_rewards.answers.forms import Answer, Items, Matrix, Quantity, Ratio, Relation, Words

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}
_ORDERS = frozenset(("<", ">", "<=", ">="))
_HUNDRED = Node("number", value=Fraction(100))
_INFINITY = Node("infinity")
_MINUS_INFINITY = Node("-", (_INFINITY,))

Interval = tuple[str, Node, Node, str]


def same_answer(expected: Answer, given: Answer, *, relative_tolerance: float = 0.0) -> bool:
    """Return True if an answer says what is expected.

    A name in front is no part of an answer: `x = 5` is 5, in both directions. Numbers are equal as numbers, sets in any
    order, tuples in theirs, intervals with their brackets, equations up to a factor.
    """
    return _Comparison(relative_tolerance).same(expected, given)


class _Comparison:
    def __init__(self, relative_tolerance: float) -> None:
        self.relative_tolerance = relative_tolerance

    def same(self, expected: Answer, given: Answer) -> bool:
        if isinstance(expected, Words) or isinstance(given, Words):
            return isinstance(expected, Words) and isinstance(given, Words) and _folded(expected) == _folded(given)
        ranges = _intervals(expected), _intervals(given)
        if ranges[0] is not None and ranges[1] is not None and self._same_intervals(ranges[0], ranges[1]):
            return _same_variable(expected, given)
        if isinstance(expected, Relation) and isinstance(given, Relation):
            return self._same_relations(expected, given)
        if isinstance(expected, Relation):
            return is_definition(expected) and self.same(stated_value(expected), given)
        if isinstance(given, Relation):
            if not set(given.signs) <= {"=", "~"} or self._contradicts(given):
                return False
            return self.same(expected, stated_value(given))
        comparisons: tuple[tuple[type, Callable[..., bool]], ...] = (
            (Matrix, self._same_matrix),
            (Items, self._same_items),
            (Ratio, self._same_ratio),
        )
        for kind, compare in comparisons:
            if isinstance(expected, kind) or isinstance(given, kind):
                return compare(expected, given)
        assert isinstance(expected, Quantity) and isinstance(given, Quantity)
        return self._same_quantity(expected, given)

    def equal(self, left: Node, right: Node) -> bool:
        return equal(left, right, relative_tolerance=self.relative_tolerance)

    def _contradicts(self, chain: Relation) -> bool:
        """Return True for `43 = 42`: numbers said to be equal that are not, and none of which is another rounded."""
        for left, right, sign in zip(chain.sides, chain.sides[1:], chain.signs, strict=False):
            values = _literal(left), _literal(right)
            if sign == "~" or values[0] is None or values[1] is None:
                continue
            slack = Fraction(1, 2) if values[1].denominator == 1 else abs(values[1]) / 100
            if abs(values[0] - values[1]) > slack and not self.same(left, right):
                return True
        return False

    def _same_quantity(self, expected: Quantity, given: Quantity) -> bool:
        """Compare numbers, in a common unit where both have one. Percent may be written as a number or a fraction."""
        if expected.unit.known and given.unit.known:
            if expected.unit.dimensions != given.unit.dimensions:
                return False
            return self.equal(_times(expected.node, expected.unit.factor), _times(given.node, given.unit.factor))
        if (expected.percent and given.unit.known) or (given.percent and expected.unit.known):
            return False
        if self.equal(expected.node, given.node):
            return True
        if expected.percent == given.percent:
            return False
        return self.equal(_share(expected), _share(given))

    def _same_ratio(self, expected: Answer, given: Answer) -> bool:
        if isinstance(expected, Ratio) and isinstance(given, Ratio):
            if len(expected.parts) != len(given.parts):
                return False
            if all(map(self._same_quantity, expected.parts, given.parts)):
                return True
            if expected.clock and given.clock:
                return False
            return self._proportional_parts(expected, given)
        ratio, other = (expected, given) if isinstance(expected, Ratio) else (given, expected)
        if not isinstance(ratio, Ratio) or not isinstance(other, Quantity) or len(ratio.parts) != 2 or other.percent:
            return False
        return self.equal(Node("/", (ratio.parts[0].node, ratio.parts[1].node)), other.node)

    def _proportional_parts(self, expected: Ratio, given: Ratio) -> bool:
        first, other = expected.parts[0].node, given.parts[0].node
        if self.equal(first, _ZERO) or self.equal(other, _ZERO):
            return False
        return all(
            self.equal(Node("*", (first, b.node)), Node("*", (other, a.node)))
            for a, b in zip(expected.parts[1:], given.parts[1:], strict=True)
        )

    def _same_matrix(self, expected: Answer, given: Answer) -> bool:
        left, right = _rows(expected), _rows(given)
        if left is None or right is None or [*map(len, left)] != [*map(len, right)]:
            return False
        return all(
            self.same(a, b) for row, other in zip(left, right, strict=True) for a, b in zip(row, other, strict=True)
        )

    def _same_items(self, expected: Answer, given: Answer) -> bool:
        named = _assignments(expected), _assignments(given)
        if named[0] is not None or named[1] is not None:
            return self._same_assignments(named, expected, given)
        left, right = _listed(expected), _listed(given)
        if right.joiner == "or" and not right.opening and not isinstance(expected, Items):
            values = [stated_value(item) if _is_equation(item) else item for item in right.items]
            agree = all(self.same(values[0], value) for value in values) and len(set(values)) > 1
            return agree and any(self.same(expected, value) for value in values)
        if "cup" in (left.joiner, right.joiner) and left.joiner != right.joiner:
            return False
        if "{" in (left.opening, right.opening):
            if {left.opening, right.opening} - {"{", ""}:
                return False
            return self._subset(left.items, right.items) and self._subset(right.items, left.items)
        if left.opening and right.opening:
            return (left.opening, left.closing) == (right.opening, right.closing) and self._in_order(
                left.items, right.items
            )
        if left.opening or right.opening:
            half_open = (left.opening + left.closing, right.opening + right.closing)
            return not {"(]", "[)"} & set(half_open) and self._in_order(left.items, right.items)
        return self._in_any_order(left.items, right.items)

    def _same_assignments(
        self, named: tuple[dict[Answer, Answer] | None, dict[Answer, Answer] | None], expected: Answer, given: Answer
    ) -> bool:
        """Compare `x = 2, y = 3` by names, or with a point or a list that has no names, in order."""
        left, right = named
        if left is not None and right is not None:
            return left.keys() == right.keys() and all(self.same(left[name], right[name]) for name in left)
        values = list((left or right or {}).values())
        other = _listed(given if left is not None else expected)
        if other.opening == "{" or other.joiner == "cup":
            return False
        return self._in_order(values, other.items) if left is not None else self._in_order(other.items, values)

    def _in_order(self, left: Sequence[Answer], right: Sequence[Answer]) -> bool:
        return len(left) == len(right) and all(map(self.same, left, right))

    def _in_any_order(self, left: Sequence[Answer], right: Sequence[Answer]) -> bool:
        rest = list(right)
        if len(left) != len(rest):
            return False
        for item in left:
            match = next((i for i, other in enumerate(rest) if self.same(item, other)), None)
            if match is None:
                return False
            del rest[match]
        return True

    def _subset(self, left: Sequence[Answer], right: Sequence[Answer]) -> bool:
        return all(any(self.same(item, other) for other in right) for item in left)

    def _same_relations(self, expected: Relation, given: Relation) -> bool:
        if is_definition(expected) and is_definition(given):
            names = expected.sides[0], given.sides[0]
            if names[0] == names[1] or isinstance(names[0], Words) or isinstance(names[1], Words):
                return self.same(stated_value(expected), stated_value(given))
        left, right = _difference(expected), _difference(given)
        if left is None or right is None:
            return False
        if left[1] != right[1]:
            return False
        return proportional(left[0], right[0], positive=left[1] in _ORDERS)

    def _same_intervals(self, left: Sequence[Interval], right: Sequence[Interval]) -> bool:
        rest = list(right)
        if len(left) != len(rest):
            return False
        for a in left:
            match = next((i for i, b in enumerate(rest) if self._same_interval(a, b)), None)
            if match is None:
                return False
            del rest[match]
        return True

    def _same_interval(self, a: Interval, b: Interval) -> bool:
        return (a[0], a[3]) == (b[0], b[3]) and self.equal(a[1], b[1]) and self.equal(a[2], b[2])


_ZERO = Node("number", value=Fraction(0))


def _literal(side: Answer) -> Fraction | None:
    """Return the number that a side of a chain is, without a unit of measure; None for anything else."""
    if not isinstance(side, Quantity) or side.unit.known:
        return None
    node = side.node.args[0] if side.node.op == "-" else side.node
    if not isinstance(node.value, Fraction):
        return None
    return -node.value if node is not side.node else node.value


def is_definition(relation: Relation) -> bool:
    """Return True for `x = 5`, `f(x) = 2x` and `Total = 12`: a name, then its value."""
    if not set(relation.signs) <= {"=", "~"}:
        return False
    first = relation.sides[0]
    if isinstance(first, Words):
        return True
    if isinstance(first, Items) and first.opening == "(":  # (x, y) = (1, 2)
        return all(isinstance(item, Quantity) and item.node.op == "symbol" for item in first.items)
    return isinstance(first, Quantity) and first.node.op in ("symbol", "unknown")


def _is_equation(answer: Answer) -> TypeGuard[Relation]:
    return isinstance(answer, Relation) and set(answer.signs) <= {"=", "~"}


def stated_value(relation: Relation) -> Answer:
    """Return what a chain of equalities ends with; where a part is approximate, what stands before that part."""
    if "~" in relation.signs:
        exact = relation.signs.index("~")
        if exact or not is_definition(relation):
            return relation.sides[exact]
    return relation.sides[-1]


def _folded(text: Words) -> str:
    return text.text.casefold()


def _times(node: Node, factor: Fraction) -> Node:
    return Node("*", (node, Node("number", value=factor)))


def _share(quantity: Quantity) -> Node:
    return Node("/", (quantity.node, _HUNDRED)) if quantity.percent else quantity.node


def _rows(answer: Answer) -> list[tuple[Answer, ...]] | None:
    """Rows of a matrix, of a list of lists, or of a tuple as a column."""
    if isinstance(answer, Matrix):
        return list(answer.rows)
    if not isinstance(answer, Items) or answer.opening not in ("(", "["):
        return None
    if all(isinstance(item, Items) and item.opening in ("(", "[") for item in answer.items):
        return [item.items for item in answer.items if isinstance(item, Items)]
    return [(item,) for item in answer.items]


def _listed(answer: Answer) -> Items:
    """Items with names taken off: `x = 2 or x = 3` and `x = 2, 3` are 2 and 3."""
    if not isinstance(answer, Items):
        return Items((answer,))
    if answer.opening == "" and answer.joiner != "cup":
        names = [item.sides[0] if isinstance(item, Relation) and is_definition(item) else None for item in answer.items]
        if names and names[0] is not None and all(name in (None, names[0]) for name in names):
            return replace(answer, items=tuple(_value(item) for item in answer.items))
    return answer


def _value(item: Answer) -> Answer:
    return stated_value(item) if isinstance(item, Relation) and is_definition(item) else item


def _assignments(answer: Answer) -> dict[Answer, Answer] | None:
    """The values of several names, `x = 2, y = 3`; None for anything else."""
    if not isinstance(answer, Items) or answer.opening or len(answer.items) < 2:
        return None
    values: dict[Answer, Answer] = {}
    for item in answer.items:
        if not isinstance(item, Relation) or not is_definition(item) or item.sides[0] in values:
            return None
        values[item.sides[0]] = stated_value(item)
    return values


def _intervals(answer: Answer) -> list[Interval] | None:
    """Return the intervals that an answer is the union of; None where it is no such thing."""
    if isinstance(answer, Relation):
        return _relation_intervals(answer)
    if not isinstance(answer, Items):
        return None
    if answer.opening == "" and answer.items and (answer.joiner in ("cup", "or", ",")):
        parts = [_intervals(item) for item in answer.items]
        if all(part is not None for part in parts) and (
            answer.joiner == "cup" or all(isinstance(item, Relation) for item in answer.items)
        ):
            return [interval for part in parts if part is not None for interval in part]
        return None
    if answer.opening in ("(", "[") and answer.closing in (")", "]") and len(answer.items) == 2:
        low, high = answer.items
        if isinstance(low, Quantity) and isinstance(high, Quantity):
            return [(answer.opening, low.node, high.node, answer.closing)]
    return None


def _relation_intervals(relation: Relation) -> list[Interval] | None:
    """`0 < x <= 1` as (0, 1], `x > 3` as (3, infinity), `x != 2` as two intervals."""
    nodes = [side.node if isinstance(side, Quantity) else None for side in relation.sides]
    if any(node is None for node in nodes) or not set(relation.signs) <= _ORDERS | {"!="}:
        return None
    sides = [node for node in nodes if node is not None]
    signs = list(relation.signs)
    if signs[0] in (">", ">="):
        sides, signs = sides[::-1], [_FLIPPED[sign] for sign in signs[::-1]]
    brackets = {"<": ("(", ")"), "<=": ("[", "]")}
    if len(sides) == 3 and sides[1].op == "symbol" and all(sign in brackets for sign in signs):
        if constant(sides[0]) is None or constant(sides[2]) is None:
            return None
        return [(brackets[signs[0]][0], sides[0], sides[2], brackets[signs[1]][1])]
    if len(sides) != 2:
        return None
    left, right = sides
    if left.op == "abs" and signs[0] in brackets and not symbols_of(right):
        return _around_zero(left.args[0], right, brackets[signs[0]])
    if signs[0] == "!=":
        name, value = (left, right) if left.op == "symbol" else (right, left)
        if name.op != "symbol" or symbols_of(value):
            return None
        return [("(", _MINUS_INFINITY, value, ")"), ("(", value, _INFINITY, ")")]
    if left.op == "symbol" and not symbols_of(right):
        return [("(", _MINUS_INFINITY, right, brackets[signs[0]][1])]
    if right.op == "symbol" and not symbols_of(left):
        return [(brackets[signs[0]][0], left, _INFINITY, ")")]
    return None


def _around_zero(inside: Node, size: Node, brackets: tuple[str, str]) -> list[Interval] | None:
    """`|x| < 3` as (-3, 3), `|x - 1| < 3` as (-2, 4)."""
    terms = inside.args if inside.op == "+" else (inside,)
    variables = [term for term in terms if term.op == "symbol"]
    constants = [term for term in terms if not symbols_of(term)]
    if len(variables) != 1 or len(constants) + 1 != len(terms):
        return None
    ends = [Node("+", (end, *(Node("-", (term,)) for term in constants))) for end in (Node("-", (size,)), size)]
    return [(brackets[0], ends[0], ends[1], brackets[1])]


def _same_variable(expected: Answer, given: Answer) -> bool:
    """True unless both are relations of different variables."""
    names = [_variables(answer) for answer in (expected, given)]
    return not names[0] or not names[1] or names[0] == names[1]


def _variables(answer: Answer) -> frozenset[str]:
    if isinstance(answer, Quantity):
        return symbols_of(answer.node)
    if isinstance(answer, Relation):
        return frozenset().union(*map(_variables, answer.sides))
    if isinstance(answer, Items):
        return frozenset().union(*map(_variables, answer.items))
    return frozenset()


def _difference(relation: Relation) -> tuple[Node, str] | None:
    """Left side minus right side, turned so that the sign is "=", "!=", "<" or "<="."""
    if len(relation.sides) != 2 or relation.signs[0] not in _FLIPPED:
        return None
    left, right = relation.sides
    if not isinstance(left, Quantity) or not isinstance(right, Quantity):
        return None
    sign = relation.signs[0]
    if sign in (">", ">="):
        left, right, sign = right, left, _FLIPPED[sign]
    return Node("+", (left.node, Node("-", (right.node,)))), sign
