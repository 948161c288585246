"""What the kinds of training data have in common: each item is some sequences of token ids that a model reads whole."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from typing import Protocol

import xxhash

from alignlab.errors import DataError

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


def digest_of(items: Iterable[tuple[Sequences, tuple[float, ...]]]) -> str:
    """Tells apart items, (sequences, labels), of other tokens or labels, or in another order."""
    digest = xxhash.xxh3_128()
    for sequences, labels in items:
        digest.update(array("q", [len(sequences), *map(len, sequences), len(labels)]).tobytes())
        for ids in sequences:
            digest.update(array("q", ids).tobytes())
        digest.update(array("d", labels).tobytes())
    return digest.hexdigest()


def check_lengths(items: Sequence[HasSequences], positions: float, *, whose: str) -> None:
    """See that every sequence fits.

    Args:
        positions: tokens that a sequence may have.
        whose: what has so many, as the message says it.

    Raises:
        DataError: one does not.
    """
    for number, item in enumerate(items):
        longest = max(map(len, item.sequences))
        if longest > positions:
            raise DataError(
                f"example {number} (the first is 0) has {longest} tokens, and must fit {whose}'s {positions:g} "
                "positions; shorten it, or leave it out"
            )
