"""Sparse rows of attention: by hand, against a slow twin, and their record."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alignlab.models.kv_approximation.choice_record import (
    Choices,
    choices_of,
    fingerprint,
    packed_choices,
    recorded_choice,
)
from alignlab.models.kv_approximation.sparse_rows import SparseRows, row_blocks
from alignlab.types import Segments
from tests.models.attention_twins import assert_equals_twin, inputs
from tests.models.conftest import make_segments
from tests.reference.attention import visible

RULES = {
    "top_k": SparseRows(2, count=2), "one": SparseRows(1, count=1), "part": SparseRows(1, part=0.4),
    "mass": SparseRows(2, mass=0.8),
}


def test_rules_by_hand() -> None:
    """Weights 1, 8, 4, 2 and 1 of 16; the last key is recent, and one more is not seen."""
    scores = torch.tensor([1.0, 8.0, 4.0, 2.0, 1.0, 0.0]).log()
    is_recent = torch.tensor([False] * 4 + [True, False])

    def chosen(**rule: float) -> list[int]:
        return SparseRows(1, **rule).chosen(scores, is_recent).nonzero()[:, 0].tolist()

    assert chosen(count=1) == [1] and chosen(count=2) == [1, 2] and chosen(count=9) == [0, 1, 2, 3]
    assert chosen(part=0.5 - 1e-6) == [1, 2] and chosen(part=0.5 + 1e-6) == [1] and chosen(part=1 / 9) == [0, 1, 2, 3]
    # With the recent one there are 1/16, then 9/16, 13/16, 15/16 of the weight.
    assert chosen(mass=0.05) == [] and chosen(mass=0.5) == [1] and chosen(mass=0.8) == [1, 2]
    assert chosen(mass=0.9) == [1, 2, 3] and chosen(mass=0.999) == [0, 1, 2, 3]


def twin(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: SparseRows) -> Tensor:
    """Return [1,H,N,V], one row of one head at a time."""
    output = torch.zeros_like(query)
    seen, positions = visible(segments), segments.position_ids
    for head in range(query.shape[1]):
        kv = head // 2
        for i in range(segments.num_tokens):
            keys = seen[i].nonzero()[:, 0]
            scores = 1.5 * torch.tanh(key[0, kv, keys] @ query[0, head, i] * 0.4 / 1.5)
            recent = [n for n, j in enumerate(keys.tolist()) if positions[i] - positions[j] < rule.recent]
            weights = scores.softmax(0).tolist()
            others = sorted(set(range(len(keys))) - set(recent), key=lambda n, weights=weights: -weights[n])
            if rule.count is not None:
                taken = others[: rule.count]
            elif rule.part is not None:
                taken = [n for n in others if weights[n] >= rule.part * max(weights)]
            else:
                taken, total = [], sum(weights[n] for n in recent)
                while others and total < rule.mass:
                    taken.append(others.pop(0))
                    total += weights[taken[-1]]
            read = sorted(recent + taken)
            output[0, head, i] = scores[read].softmax(0) @ value[0, kv, keys[read]]
    return output


@pytest.mark.parametrize("rule", RULES)
def test_rows_equal_one_query_at_a_time(rule: str) -> None:
    """Values, and gradients, which go through the keys that are read alone."""
    segments, sparse = make_segments([(5, [3, 7]), (6, []), (9, [1, 4])]), RULES[rule]
    ours, twins = (inputs(segments.num_tokens) for _ in range(2))
    output = sparse.attend(*ours, segments, scaling=0.4, sliding_window=None, softcap=1.5, sinks=None).transpose(1, 2)
    expected = twin(*twins, segments, sparse)
    assert_equals_twin(output, ours, expected, twins)


def test_a_long_sequence_is_cut_into_runs_that_meet_their_whole_prompt() -> None:
    segments, sparse = make_segments([(300, [70, 90]), (210, [])]), RULES["top_k"]
    tensors = [x.detach() for x in inputs(segments.num_tokens)]
    options = {"scaling": 0.4, "sliding_window": None, "softcap": None, "sinks": None}
    assert len(row_blocks(segments)) > 3
    output = sparse.attend(*tensors, segments, **options)
    for segment in (1, 2):
        runs = [range(segments.starts[i], segments.starts[i] + segments.lengths[i]) for i in (0, segment)]
        tokens = torch.tensor([token for run in runs for token in run])
        alone = sparse.attend(*(x[:, :, tokens] for x in tensors), Segments.single(len(tokens)), **options)
        own = slice(300, None)
        torch.testing.assert_close(output[:, tokens[own]], alone[:, own], atol=1e-9, rtol=0)


def near_ties(rows: int, width: int) -> tuple[Tensor, Tensor]:
    """Return scores, and others 3e-3 away, with more than one key within that of many edges."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(rows, width, generator=generator)
    return scores, scores + 3e-3 * torch.randn(scores.shape, generator=generator)


@pytest.mark.parametrize("rule", RULES)
def test_the_record_gives_the_same_choice_to_scores_that_are_a_little_off(rule: str) -> None:
    scores, other = near_ties(4000, 60)
    sparse, nobody = RULES[rule], torch.zeros(60, dtype=torch.bool)
    expected, own = sparse.chosen(scores, nobody), sparse.chosen(other, nobody)
    positions = torch.arange(60).expand(scores.shape)
    numbers = packed_choices(expected, positions)
    record = torch.cat((torch.ones(4000, 1, dtype=torch.uint8), numbers[:, None].contiguous().view(torch.uint8)), dim=1)
    choices = choices_of(record, 1)
    of_rows = Choices(choices.counts[:, 0], choices.fingerprints[:, 0])
    assert (own != expected).any(1).sum() > 10
    assert torch.equal(recorded_choice(own, other, positions, of_rows), expected)
    record[:, 0] = 0  # no record: its own choice
    unknown = choices_of(record, 1)
    of_rows = Choices(unknown.counts[:, 0], unknown.fingerprints[:, 0])
    assert torch.equal(recorded_choice(own, other, positions, of_rows), own)


def test_a_choice_that_is_far_from_the_record_stays() -> None:
    """After larger changes of the weights no near set has the fingerprint."""
    scores = torch.arange(20.0)[None]
    own = scores >= 16
    positions = torch.arange(20)[None]
    far = torch.zeros_like(own)
    far[0, [0, 2, 4, 7]] = True
    choices = Choices(far.sum(1), fingerprint(far, positions))
    assert torch.equal(recorded_choice(own, scores, positions, choices), own)


def test_near_sets_at_the_ends_of_a_row() -> None:
    """Rows that choose nothing, or all but one, of few keys: what does not exist is neither left out nor taken."""
    positions, scores = torch.arange(4)[None], torch.tensor([[3.0, 2.0, 1.0, -torch.inf]])
    for members in ([], [0], [1], [0, 2], [1, 2], [0, 1, 2]):
        expected = torch.zeros(1, 4, dtype=torch.bool)
        expected[0, members] = True
        choices = Choices(expected.sum(1), fingerprint(expected, positions))
        own = torch.tensor([[True, True, False, False]])
        assert torch.equal(recorded_choice(own, scores, positions, choices), expected), members


def test_fingerprints_tell_sets_of_equal_sums_apart() -> None:
    """{a, b} and {a + n, b - n} for all a and b below 64: of 2016 sets few share a number."""
    pairs = torch.combinations(torch.arange(64))
    chosen = torch.zeros(len(pairs), 64, dtype=torch.bool).scatter_(1, pairs, True)
    numbers = fingerprint(chosen, torch.arange(64))
    expected_collisions = math.comb(len(pairs), 2) / 2**16
    assert len(pairs) - len(numbers.unique()) < 2 * expected_collisions


def test_a_record_of_one_token_is_read() -> None:
    """In the layout that it has in a pack: whole numbers of one row begin anywhere."""
    record = torch.zeros(1, 3, 1 + 4 * 2, dtype=torch.uint8)
    numbers = torch.tensor([[3 | 7 << 16, 2 | 9 << 16]], dtype=torch.int32)
    record[:, 1, 0], record[:, 1, 1:] = 1, numbers.view(torch.uint8)
    choices = choices_of(record[:, 1], 2)
    assert choices.counts.tolist() == [[3, 2]] and choices.fingerprints.tolist() == [[7, 9]]
