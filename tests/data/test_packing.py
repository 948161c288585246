from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data.examples import Example
from alignlab.data.packing import balanced_bins, pack_examples, pack_rollouts
from alignlab.errors import DataError
from alignlab.types import Completion, Experience, Prompt, Rollout
from tests.reference.packing import unpack

LAYERS, EXPERTS = 2, 1


def completion(ids: Sequence[int], routing: torch.Tensor | None = None) -> Completion:
    logprobs = tuple(-0.25 * token for token in ids)
    return Completion(tuple(ids), "", logprobs, logprobs, "stop", (0,) * len(ids), routing)


def rollout(prompt: Sequence[int], completions: Sequence[Sequence[int]]) -> Rollout:
    return Rollout(Prompt(tuple(prompt), "p"), tuple(completion(ids) for ids in completions))


tokens = st.integers(1, 99)
Group = tuple[list[int], list[list[int]]]
groups = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=12),
        st.lists(st.lists(tokens, max_size=12), min_size=1, max_size=5),
    ),
    max_size=5,
)


def expected_sequences(rollouts: Sequence[Rollout]) -> dict[int, list[tuple[int, bool]]]:
    pairs = [(r.prompt, c) for r in rollouts for c in r.completions]
    return {
        i: [(token, False) for token in prompt.token_ids] + [(token, True) for token in done.token_ids]
        for i, (prompt, done) in enumerate(pairs)
        if done.token_ids
    }


@settings(deadline=None, max_examples=60)
@given(groups, st.integers(1, 40), st.booleans())
def test_every_sequence_comes_back_whole_and_budgets_hold(drawn: list[Group], budget: int, share_prefix: bool) -> None:
    rollouts = [rollout(*group) for group in drawn]
    packs = pack_rollouts(rollouts, budget=budget, share_prefix=share_prefix)
    assert unpack(packs) == expected_sequences(rollouts)
    masked = sum(int(pack.completion_mask.sum()) for pack in packs)
    assert masked == sum(len(c.token_ids) for r in rollouts for c in r.completions)
    for pack in packs:
        num_sequences = sum(i >= 0 for i in pack.segments.sequence_ids)
        assert pack.num_tokens <= budget or num_sequences == 1


@settings(deadline=None, max_examples=40)
@given(groups, st.integers(1, 40), st.booleans())
def test_logprobs_lie_under_their_tokens(drawn: list[Group], budget: int, share_prefix: bool) -> None:
    for pack in pack_rollouts([rollout(*group) for group in drawn], budget=budget, share_prefix=share_prefix):
        assert pack.rollout_logprobs is not None
        torch.testing.assert_close(pack.rollout_logprobs, -0.25 * pack.tokens * pack.completion_mask, rtol=0, atol=0)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 30), max_size=30), st.integers(1, 40))
def test_bins_hold_each_item_once_and_are_half_full_on_average(sizes: list[int], capacity: int) -> None:
    bins = balanced_bins(sizes, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    loads = [sum(sizes[i] for i in members) for members in bins]
    assert all(load <= capacity or len(members) == 1 for load, members in zip(loads, bins, strict=True))
    assert len(bins) <= 2 * sum(loads) / capacity + 1


def test_bins_are_few_and_even() -> None:
    assert balanced_bins([4, 4, 6, 6], 10) == [[0, 2], [1, 3]]
    assert balanced_bins([6, 4, 3, 3, 2, 2], 10) == [[0, 1], [2, 3, 4, 5]]
    assert balanced_bins([1] * 12, 10) == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9, 11]]


def test_a_group_in_one_pack_by_hand() -> None:
    (pack,) = pack_rollouts([rollout([1, 2, 3], [[4, 5], [], [6]])], budget=100)
    assert pack.tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert pack.completion_mask.tolist() == [False, False, False, True, True, True]
    assert pack.segments.lengths == (3, 2, 1)
    assert pack.segments.prefixes == (-1, 0, 0)
    assert pack.segments.sequence_ids == (-1, 0, 2)
    assert pack.segments.group_ids == (0, 0, 0)
    assert pack.routing is None


def test_unshared_sequences_are_roots_by_hand() -> None:
    (pack,) = pack_rollouts([rollout([1], [[4, 5], [6]]), rollout([2], [[7]])], budget=100, share_prefix=False)
    assert pack.tokens.tolist() == [1, 4, 5, 1, 6, 2, 7]
    assert pack.segments.lengths == (3, 2, 2)
    assert pack.segments.prefixes == (-1, -1, -1)
    assert pack.segments.sequence_ids == (0, 1, 2)
    assert pack.segments.group_ids == (0, 0, 1)


def test_a_group_over_the_budget_is_divided_and_its_prompt_repeated() -> None:
    packs = pack_rollouts([rollout([1, 2], [[3, 3], [4, 4], [5, 5]])], budget=6)
    assert [pack.segments.group_ids for pack in packs] == [(0, 0, 0), (0, 0)]
    assert all(pack.tokens.tolist()[:2] == [1, 2] for pack in packs)


def test_a_sequence_longer_than_the_budget_has_a_pack_of_its_own() -> None:
    packs = pack_rollouts([rollout([1, 2], [[3] * 9, [4]])], budget=5)
    assert [pack.segments.sequence_ids for pack in packs] == [(-1, 0), (-1, 1)]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_routing_follows_its_tokens(share_prefix: bool) -> None:
    records = [torch.arange(4 * LAYERS).reshape(4, LAYERS, EXPERTS).to(torch.int16) + 100 * i for i in range(2)]
    group = (completion([7, 8], records[0]), completion([8, 8], records[1]), completion([9]))
    (pack,) = pack_rollouts([Rollout(Prompt((1, 2), "p"), group)], budget=99, share_prefix=share_prefix)
    assert pack.routing is not None and pack.routing.dtype == torch.int16
    none = torch.full((1, LAYERS, EXPERTS), -1, dtype=torch.int16)
    if share_prefix:
        expected = torch.cat([records[0], records[1][2:], none])
    else:
        expected = torch.cat([records[0], records[1], none, none, none])
    assert torch.equal(pack.routing, expected)


def test_a_prompt_without_tokens_is_refused() -> None:
    with pytest.raises(DataError, match="at least one token"):
        pack_rollouts([rollout([], [[1]])], budget=9)


def test_no_rollouts_make_no_packs() -> None:
    assert pack_rollouts([], budget=9) == []
    assert pack_rollouts([rollout([1], [[]])], budget=9) == []


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(tokens, min_size=2, max_size=12), max_size=8), st.integers(1, 30))
def test_examples_come_back_whole(sequences: list[list[int]], budget: int) -> None:
    examples = [Example(tuple(ids), tuple(i > 0 and ids[i] % 2 == 0 for i in range(len(ids)))) for ids in sequences]
    packs: list[Experience] = pack_examples(examples, budget=budget)
    expected = {i: list(zip(e.token_ids, e.completion_mask, strict=True)) for i, e in enumerate(examples)}
    assert unpack(packs) == expected
    assert all(pack.num_tokens <= budget or len(pack.segments.lengths) == 1 for pack in packs)
    assert all(pack.rollout_logprobs is None for pack in packs)
