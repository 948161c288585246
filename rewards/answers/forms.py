"""Forms of an answer: `reading` makes them of a text, `comparison` compares them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeGuard

from alignlab_rewards.answers.expressions import INFINITY, MINUS_INFINITY, Node
from alignlab_rewards.answers.units import Unit

NO_UNIT = Unit()


@dataclass(frozen=True)
class Quantity:
    """An expression with its unit.

    Attributes:
        node: the expression, without percent or unit.
        unit: a unit of measure, or words; an empty Unit where there is none.
        percent: a percent sign follows.
    """

    node: Node
    unit: Unit = NO_UNIT
    percent: bool = False


@dataclass(frozen=True)
class Items:
    """Several answers: a list, a set, a tuple, an interval, or a union of these.

    Attributes:
        items: the parts.
        opening, closing: brackets, "{" for sets; "" for a bare list.
        joiner: ",", ";", "and", "or", or "cup" for a union.
    """

    items: tuple[Answer, ...]
    opening: str = ""
    closing: str = ""
    joiner: str = ","


@dataclass(frozen=True)
class Relation:
    """A chain of sides with a sign between each two: `0 < x < 1`, `x = 2/3 ~ 0.67`."""

    sides: tuple[Answer, ...]
    signs: tuple[str, ...]

    @property
    def is_equation(self) -> bool:
        """True where every sign is "=" or "~"."""
        return set(self.signs) <= {"=", "~"}

    @property
    def is_definition(self) -> bool:
        """True for a name and its value: `x = 5`, `f(x) = 2x`, `Total = 12`, `(x, y) = (1, 2)`."""
        name = self.sides[0]
        if isinstance(name, Items) and name.opening == "(":
            is_name = all(isinstance(item, Quantity) and item.node.op == "symbol" for item in name.items)
        else:
            is_name = isinstance(name, Words) or (isinstance(name, Quantity) and name.node.op in ("symbol", "unknown"))
        return self.is_equation and is_name

    @property
    def stated_value(self) -> Answer:
        """The last side of a chain of equalities; with an approximation, the exact side in front of it."""
        if "~" in self.signs:
            exact = self.signs.index("~")
            # In `x ~ 0.67` the side in front is the name, and the approximation is all there is.
            if exact or not self.is_definition:
                return self.sides[exact]
        return self.sides[-1]


@dataclass(frozen=True)
class Ratio:
    """Parts of a ratio, `3:4`; `clock` is true where it may be a time of day, `12:30`."""

    parts: tuple[Quantity, ...]
    clock: bool = False


@dataclass(frozen=True)
class Matrix:
    """Rows of cells."""

    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Words:
    """Text that is not mathematics, as `markup.words` writes it."""

    text: str


Answer = Quantity | Items | Relation | Ratio | Matrix | Words

REALS = Items((Quantity(MINUS_INFINITY), Quantity(INFINITY)), "(", ")")


def is_definition(answer: Answer) -> TypeGuard[Relation]:
    """Return True for a relation that gives a name its value."""
    return isinstance(answer, Relation) and answer.is_definition


def is_mathematics(answer: Answer) -> bool:
    """Return True if no part of an answer is words; the name in front of a relation may be: `Total = 12`."""
    answers: tuple[Answer, ...] = ()
    if isinstance(answer, Items):
        answers = answer.items
    elif isinstance(answer, Relation):
        answers = answer.sides[1:]
    elif isinstance(answer, Matrix):
        answers = tuple(cell for row in answer.rows for cell in row)
    return not isinstance(answer, Words) and all(map(is_mathematics, answers))
