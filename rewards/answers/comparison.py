"""Compare two answers that were read: the expected one and one of a completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import NamedTuple, TypeVar

from alignlab_rewards.answers.equality import equal, proportional, symbols_of
from alignlab_rewards.answers.expressions import Node, negative, number
from alignlab_rewards.answers.forms import Answer, Items, Matrix, Quantity, Ratio, Relation, Words, is_definition
from alignlab_rewards.answers.intervals import FLIPPED, ORDERS, Interval, intervals_of

_T = TypeVar("_T")


def same_answer(expected: Answer, answer: Answer, *, relative_tolerance: float = 0.0) -> bool:
    """Return True if an answer says what is expected.

    A name in front is no part of an answer: `x = 5` is 5, in both directions. Numbers are equal as numbers, sets in any
    order, tuples in theirs, intervals with their brackets, equations up to a factor.
    """
    return _Comparison(relative_tolerance).same(expected, answer)


class _Comparison:
    def __init__(self, relative_tolerance: float) -> None:
        self.relative_tolerance = relative_tolerance

    def same(self, expected: Answer, answer: Answer) -> bool:
        """Compare two answers of any form."""
        if isinstance(expected, Words) or isinstance(answer, Words):
            return _same_words(expected, answer)
        if self._same_intervals(expected, answer):
            return _same_variables(expected, answer)
        for form, compare in _BY_FORM:
            if isinstance(expected, form) or isinstance(answer, form):
                return compare(self, expected, answer)
        raise AssertionError(f"no form of an answer: {expected!r:.80}, {answer!r:.80}")

    def equal(self, first: Node, second: Node) -> bool:
        return equal(first, second, relative_tolerance=self.relative_tolerance)

    def _same_intervals(self, expected: Answer, answer: Answer) -> bool:
        unions = intervals_of(expected), intervals_of(answer)
        return unions[0] is not None and unions[1] is not None and _pair_up(unions[0], unions[1], self._same_interval)

    def _same_interval(self, expected: Interval, interval: Interval) -> bool:
        same_brackets = (expected.opening, expected.closing) == (interval.opening, interval.closing)
        return same_brackets and self.equal(expected.low, interval.low) and self.equal(expected.high, interval.high)

    def _same_relation(self, expected: Answer, answer: Answer) -> bool:
        """Compare two relations, or a relation that states a value with that value: `x = 5` with 5."""
        if not isinstance(answer, Relation):
            return is_definition(expected) and self.same(expected.stated_value, answer)
        if not isinstance(expected, Relation):
            return answer.is_equation and not self._contradicts(answer) and self.same(expected, answer.stated_value)
        if _define_the_same(expected, answer):
            return self.same(expected.stated_value, answer.stated_value)
        expected_difference, difference = _difference(expected), _difference(answer)
        if expected_difference is None or difference is None or expected_difference.sign != difference.sign:
            return False
        return proportional(expected_difference.node, difference.node, positive=difference.sign in ORDERS)

    def _contradicts(self, chain: Relation) -> bool:
        """Return True for a chain that equates different numbers: `43 = 42`, but not a rounded one: `2/3 = 0.67`."""
        for side, next_side, sign in zip(chain.sides, chain.sides[1:], chain.signs, strict=False):
            exact, rounded = _literal(side), _literal(next_side)
            if sign == "~" or exact is None or rounded is None:
                continue
            slack = Fraction(1, 2) if rounded.denominator == 1 else abs(rounded) / 100
            if abs(exact - rounded) > slack and not self.same(side, next_side):
                return True
        return False

    def _same_quantity(self, expected: Answer, answer: Answer) -> bool:
        """Compare numbers, in a common unit where both have one."""
        assert isinstance(expected, Quantity) and isinstance(answer, Quantity)
        if expected.unit.known and answer.unit.known:
            return self._same_measure(expected, answer)
        if any(a.percent and b.unit.known for a, b in ((expected, answer), (answer, expected))):
            return False
        if self.equal(expected.node, answer.node):  # `28%` may be written as 28 ...
            return True
        # ... or as 0.28.
        return expected.percent != answer.percent and self.equal(_as_fraction(expected), _as_fraction(answer))

    def _same_measure(self, expected: Quantity, answer: Quantity) -> bool:
        same_dimensions = expected.unit.dimensions == answer.unit.dimensions
        return same_dimensions and self.equal(_in_base_units(expected), _in_base_units(answer))

    def _same_ratio(self, expected: Answer, answer: Answer) -> bool:
        """Compare two ratios, or a ratio with a fraction: `3:4` with 3/4."""
        if isinstance(expected, Ratio) and isinstance(answer, Ratio):
            return self._same_parts(expected, answer)
        ratio, quantity = (expected, answer) if isinstance(expected, Ratio) else (answer, expected)
        if not isinstance(ratio, Ratio) or not isinstance(quantity, Quantity):
            return False
        if len(ratio.parts) != 2 or quantity.percent:
            return False
        return self.equal(Node("/", (ratio.parts[0].node, ratio.parts[1].node)), quantity.node)

    def _same_parts(self, expected: Ratio, answer: Ratio) -> bool:
        if len(expected.parts) != len(answer.parts):
            return False
        if all(map(self._same_quantity, expected.parts, answer.parts)):
            return True
        # 1:20 and 2:40 are equal ratios, but different times.
        return not (expected.clock and answer.clock) and self._proportional_parts(expected, answer)

    def _proportional_parts(self, expected: Ratio, answer: Ratio) -> bool:
        expected_nodes, nodes = ([part.node for part in ratio.parts] for ratio in (expected, answer))
        if self.equal(expected_nodes[0], number(0)) or self.equal(nodes[0], number(0)):
            return False
        return all(
            self.equal(Node("*", (expected_nodes[0], b)), Node("*", (nodes[0], a)))
            for a, b in zip(expected_nodes[1:], nodes[1:], strict=True)
        )

    def _same_matrix(self, expected: Answer, answer: Answer) -> bool:
        rows = _rows(expected), _rows(answer)
        if rows[0] is None or rows[1] is None:
            return False
        return len(rows[0]) == len(rows[1]) and all(map(self._in_order, rows[0], rows[1]))

    def _same_items(self, expected: Answer, answer: Answer) -> bool:
        values = _assignments(expected), _assignments(answer)
        if values[0] is not None and values[1] is not None:
            return self._same_assignments(values[0], values[1])
        if values[0] is not None or values[1] is not None:
            return self._same_without_names(_values_in_order(expected), _values_in_order(answer))
        items = _without_names(answer)
        if items.joiner == "or" and not items.opening and not isinstance(expected, Items):
            return self._same_alternatives(expected, items.items)
        return self._same_collection(_without_names(expected), items)

    def _same_assignments(self, expected: dict[Answer, Answer], values: dict[Answer, Answer]) -> bool:
        """Compare `x = 2, y = 3` with `y = 3, x = 2`, by names."""
        return expected.keys() == values.keys() and all(self.same(expected[name], values[name]) for name in expected)

    def _same_without_names(self, expected: Items, answer: Items) -> bool:
        """Compare `x = 2, y = 3` with the point (2, 3) or the list `2, 3`."""
        have_order = all(items.opening != "{" and items.joiner != "cup" for items in (expected, answer))
        return have_order and self._in_order(expected.items, answer.items)

    def _same_alternatives(self, expected: Answer, alternatives: Sequence[Answer]) -> bool:
        """Compare one answer with different ways to write it: `1/2 or 0.5`, but not with an offer of two answers."""
        values = [
            answer.stated_value if isinstance(answer, Relation) and answer.is_equation else answer
            for answer in alternatives
        ]
        if len(set(values)) == 1 or not all(self.same(values[0], value) for value in values):
            return False
        return any(self.same(expected, value) for value in values)

    def _same_collection(self, expected: Items, answer: Items) -> bool:
        """Compare sets and lists in any order, tuples and intervals in theirs with equal brackets."""
        if (expected.joiner == "cup") != (answer.joiner == "cup"):
            return False
        openings = {expected.opening, answer.opening}
        if "{" in openings:
            return openings <= {"{", ""} and self._same_set(expected.items, answer.items)
        if openings == {""}:
            return _pair_up(expected.items, answer.items, self.same)
        brackets = {expected.opening + expected.closing, answer.opening + answer.closing}
        # A list without brackets may be a point or an interval, but not a half-open one.
        fit = not brackets & {"(]", "[)"} if "" in openings else len(brackets) == 1
        return fit and self._in_order(expected.items, answer.items)

    def _in_order(self, expected: Sequence[Answer], answers: Sequence[Answer]) -> bool:
        return len(expected) == len(answers) and all(map(self.same, expected, answers))

    def _same_set(self, expected: Sequence[Answer], answers: Sequence[Answer]) -> bool:
        """Compare without regard to order and repetition."""
        none_missing = all(any(self.same(member, answer) for answer in answers) for member in expected)
        return none_missing and all(any(self.same(answer, member) for member in expected) for answer in answers)


# In this order: a list may be a matrix, a point or a set, and a quantity may be compared with any form.
_BY_FORM: tuple[tuple[type, Callable[[_Comparison, Answer, Answer], bool]], ...] = (
    (Relation, _Comparison._same_relation),
    (Matrix, _Comparison._same_matrix),
    (Items, _Comparison._same_items),
    (Ratio, _Comparison._same_ratio),
    (Quantity, _Comparison._same_quantity),
)


def _pair_up(items: Sequence[_T], partners: Sequence[_T], same: Callable[[_T, _T], bool]) -> bool:
    """Return True if every item has a partner of its own, and none remains."""
    if len(items) != len(partners):
        return False
    unpaired = list(partners)
    for item in items:
        index = next((i for i, partner in enumerate(unpaired) if same(item, partner)), None)
        if index is None:
            return False
        del unpaired[index]
    return True


def _same_words(expected: Answer, answer: Answer) -> bool:
    are_words = isinstance(expected, Words) and isinstance(answer, Words)
    return are_words and expected.text.casefold() == answer.text.casefold()


def _define_the_same(expected: Relation, answer: Relation) -> bool:
    """Return True for two definitions of one name, and of names in words: `Total = 12` and `Sum = 12`."""
    names = expected.sides[0], answer.sides[0]
    same_name = names[0] == names[1] or isinstance(names[0], Words) or isinstance(names[1], Words)
    return same_name and expected.is_definition and answer.is_definition


def _literal(side: Answer) -> Fraction | None:
    """Return the number that a side of a chain is, without a unit of measure; None for anything else."""
    if not isinstance(side, Quantity) or side.unit.known:
        return None
    is_negative = side.node.op == "-"
    value = (side.node.args[0] if is_negative else side.node).value
    if not isinstance(value, Fraction):
        return None
    return -value if is_negative else value


def _in_base_units(quantity: Quantity) -> Node:
    return Node("*", (quantity.node, number(quantity.unit.factor)))


def _as_fraction(quantity: Quantity) -> Node:
    """Return 28/100 for `28%`."""
    return Node("/", (quantity.node, number(100))) if quantity.percent else quantity.node


def _rows(answer: Answer) -> list[tuple[Answer, ...]] | None:
    """Return the rows of a matrix, of a list of lists, or of a tuple as a column."""
    if isinstance(answer, Matrix):
        return list(answer.rows)
    if not isinstance(answer, Items) or answer.opening not in ("(", "["):
        return None
    rows = [item.items for item in answer.items if isinstance(item, Items) and item.opening in ("(", "[")]
    return rows if len(rows) == len(answer.items) else [(item,) for item in answer.items]


def _assignments(answer: Answer) -> dict[Answer, Answer] | None:
    """Return the values of several names, `x = 2, y = 3`; None for anything else."""
    if not isinstance(answer, Items) or answer.opening or len(answer.items) < 2:
        return None
    values = {item.sides[0]: item.stated_value for item in answer.items if is_definition(item)}
    return values if len(values) == len(answer.items) else None


def _values_in_order(answer: Answer) -> Items:
    values = _assignments(answer)
    return _without_names(answer) if values is None else Items(tuple(values.values()), "(", ")")


def _without_names(answer: Answer) -> Items:
    """Return an answer's items without the name that they share: 2 and 3 for `x = 2 or x = 3` and for `x = 2, 3`."""
    if not isinstance(answer, Items):
        return Items((answer,))
    names = [item.sides[0] if is_definition(item) else None for item in answer.items]
    may_share = answer.opening == "" and answer.joiner != "cup" and names[:1] != [None]
    if not may_share or not set(names[1:]) <= {None, *names[:1]}:
        return answer
    return replace(answer, items=tuple(item.stated_value if is_definition(item) else item for item in answer.items))


def _same_variables(expected: Answer, answer: Answer) -> bool:
    """Return True unless two answers have different variables: `x < 3` and `y < 3`, but not `x < 3` and (-oo, 3)."""
    names = _variables(expected), _variables(answer)
    return not names[0] or not names[1] or names[0] == names[1]


def _variables(answer: Answer) -> frozenset[str]:
    if isinstance(answer, Quantity):
        return symbols_of(answer.node)
    answers = answer.sides if isinstance(answer, Relation) else answer.items if isinstance(answer, Items) else ()
    return frozenset().union(*map(_variables, answers))


class _Difference(NamedTuple):
    """The left side of a relation minus its right side, and the sign between that and 0."""

    node: Node
    sign: str


def _difference(relation: Relation) -> _Difference | None:
    """Return the difference of two sides with the sign "=", "!=", "<" or "<="; None for other relations."""
    if len(relation.sides) != 2 or relation.signs[0] not in FLIPPED:
        return None
    (first, second), sign = relation.sides, relation.signs[0]
    if not isinstance(first, Quantity) or not isinstance(second, Quantity):
        return None
    if sign in (">", ">="):
        first, second, sign = second, first, FLIPPED[sign]
    return _Difference(Node("+", (first.node, negative(second.node))), sign)
