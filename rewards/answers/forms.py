"""Forms of an answer: what `reading` makes of a text and `comparison` compares."""

from __future__ import annotations

from dataclasses import dataclass

from alignlab_rewards.answers.expressions import Node
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
    """A chain of sides and the signs between them, one less: `0 < x < 1`."""

    sides: tuple[Answer, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Ratio:
    """Parts of a ratio, `3:4`; `clock` where it may be a time of day, `12:30`."""

    parts: tuple[Quantity, ...]
    clock: bool = False


@dataclass(frozen=True)
class Matrix:
    """Rows of cells."""

    rows: tuple[tuple[Answer, ...], ...]


@dataclass(frozen=True)
class Words:
    """Text that is no mathematics, as `markup.words` writes it."""

    text: str


Answer = Quantity | Items | Relation | Ratio | Matrix | Words
