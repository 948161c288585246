"""Sequences of token ids: what tells data apart, and what is too long."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import pytest

from alignlab.data.dataset import Dataset, digest_of, fitting
from alignlab.data.examples import Example
from alignlab.data.preferences import Preference
from alignlab.data.unpaired import UnpairedPreference
from alignlab.errors import DataError
from alignlab.types import TokenSequences

PAIR = Preference((1, 2), (3, 4, 5), (6,))
UNPAIRED = UnpairedPreference((1, 2), (3,), True, mismatched=(7, 8))


def test_the_sequences_of_an_item_are_what_a_model_reads() -> None:
    assert Example((1, 2), (False, True)).sequences == ((1, 2),)
    assert PAIR.sequences == ((1, 2, 3, 4, 5), (1, 2, 6))
    assert UNPAIRED.sequences == ((1, 2, 3), (1, 2, 7, 8))


@dataclass(frozen=True)
class Item:
    sequences: TokenSequences
    labels: tuple[float, ...] = ()


def test_the_digest_depends_on_tokens_order_and_lengths() -> None:
    datasets = [
        [((1, 2), (3,))], [((1,), (2, 3))], [((1, 2),), ((3,),)], [((3,),), ((1, 2),)], [((1, 2, 3),)],
        [((1, 2), (4,))], [((1, 2), (3,), ())], [],
    ]  # fmt: skip
    digests = {digest_of(Item(sequences) for sequences in dataset) for dataset in datasets}
    assert len(digests) == len(datasets)
    assert digest_of([Item(((1, 2), (3,)))]) in digests


def test_the_digest_depends_on_labels() -> None:
    items = [
        Example((1, 2, 3), (False, True, True)), Example((1, 2, 3), (False, False, True)), PAIR,
        replace(PAIR, margin=1.0), replace(PAIR, probability=0.9), UNPAIRED, replace(UNPAIRED, desirable=False),
    ]  # fmt: skip
    assert len({digest_of([item]) for item in items}) == len(items)


@pytest.mark.parametrize(("item", "longest"), [(Example((1, 2, 3), (False, True, True)), 3), (PAIR, 5), (UNPAIRED, 4)])
def test_an_item_that_is_too_long_is_refused_with_its_number(
    item: Example | Preference | UnpairedPreference, longest: int
) -> None:
    short = Example((1, 2), (False, True))
    for limit in (longest, float("inf")):
        assert fitting([short, item], {"the model": limit}, skip=False) == [short, item]
    told = rf"example 1 \(the first is 0\) has {longest} tokens, and must fit the teacher's {longest - 1} positions"
    with pytest.raises(DataError, match=told):
        fitting([short, item], {"the model": longest, "the teacher": longest - 1}, skip=False)
    kept = fitting([short, item], {"the model": longest, "the teacher": longest - 1}, skip=True)
    assert kept == Dataset((short,), Counter(no_room=1))
    assert fitting(Dataset((short, item), Counter(too_long=2)), {"the model": longest - 1}, skip=True) == Dataset(
        (short,), Counter(no_room=1, too_long=2)
    )


def test_a_dataset_without_a_fitting_item_is_refused_with_the_lengths() -> None:
    with pytest.raises(DataError, match="all 2 examples have more tokens than the model's 2 positions, the shortest 3"):
        fitting([Example((1, 2, 3), (False, True, True)), PAIR], {"the model": 2}, skip=True)
