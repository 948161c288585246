"""What the kinds of training data have in common: each item is some sequences of token ids that a model reads whole."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, TypeVar

import xxhash

from alignlab.errors import DataError

logger = logging.getLogger(__name__)
Sequences = tuple[tuple[int, ...], ...]


class HasSequences(Protocol):
    """An item of training data."""

    @property
    def sequences(self) -> Sequences:
        """Token ids of each sequence, its prompt included."""
        ...

    @property
    def labels(self) -> tuple[float, ...]:
        """What is known of it beside them."""
        ...


Item = TypeVar("Item", bound=HasSequences)


def digest_of(items: Iterable[tuple[Sequences, tuple[float, ...]]]) -> str:
    """Tells apart items, (sequences, labels), of other tokens or labels, or in another order."""
    digest = xxhash.xxh3_128()
    for sequences, labels in items:
        digest.update(array("q", [len(sequences), *map(len, sequences), len(labels)]).tobytes())
        for ids in sequences:
            digest.update(array("q", ids).tobytes())
        digest.update(array("d", labels).tobytes())
    return digest.hexdigest()


def fitting(
    items: Sequence[Item], positions: Mapping[str, float], *, skip: bool,
    advice: str = "data.on_bad_row=skip",
) -> Sequence[Item]:
    """The items whose sequences fit.

    Args:
        positions: tokens that a sequence may have, by what has so many, such as "the model".
        skip: leave the others out, and say how many.
        advice: how the user asks for that.

    Raises:
        DataError: one does not fit, and is not to be left out; or none fits.
    """
    whose, limit = min(positions.items(), key=lambda each: each[1])
    longest = [max(map(len, item.sequences)) for item in items]
    long = [number for number, length in enumerate(longest) if length > limit]
    if not long:
        return items
    if not skip:
        raise DataError(
            f"example {long[0]} (the first is 0) has {longest[long[0]]} tokens, and must fit {whose}'s {limit:g} "
            f"positions; shorten it, or set {advice} to leave such rows out"
        )
    if len(long) == len(items):
        raise DataError(
            f"all {len(items)} examples have more tokens than {whose}'s {limit:g} positions, the shortest "
            f"{min(longest)}; give shorter rows, or a model of more positions"
        )
    logger.warning("skipped %d of %d examples: more tokens than %s's %g positions", len(long), len(items), whose, limit)
    return [item for item, length in zip(items, longest, strict=True) if length <= limit]
