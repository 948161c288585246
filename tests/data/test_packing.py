from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data.examples import Example
from alignlab.data.packing import balanced_bins, pack_examples, pack_groups, pack_rollouts
from alignlab.errors import DataError
from alignlab.types import Completion, Experience, Prompt, Rollout, Writer
from tests.reference.packing import unpack

LAYERS, EXPERTS = 2, 1


def completion(ids: Sequence[int], routing: torch.Tensor | None = None) -> Completion:
    return replace(Completion.of(ids, logprobs=[-0.25 * token for token in ids]), routing=routing)


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


written = st.lists(st.tuples(tokens, st.sampled_from(("policy", "tool", "user"))), min_size=1, max_size=12)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.lists(written, min_size=1, max_size=4), min_size=1, max_size=4), st.integers(1, 40), st.booleans())
def test_only_tokens_of_the_policy_are_in_the_mask_and_have_logprobs(
    drawn: list[list[list[tuple[int, Writer]]]], budget: int, share_prefix: bool
) -> None:
    """Mixed completions: each token is written by the policy, a tool or the user."""
    rollouts = [Rollout(Prompt((7, 7), "p"), tuple(mixed_completion(pairs) for pairs in group)) for group in drawn]
    packs = pack_rollouts(rollouts, budget=budget, share_prefix=share_prefix)
    prompt = [(7, False), (7, False)]
    completions = [pairs for group in drawn for pairs in group]
    assert unpack(packs) == {
        i: prompt + [(token, writer == "policy") for token, writer in pairs] for i, pairs in enumerate(completions)
    }
    for pack in packs:
        torch.testing.assert_close(pack.rollout_logprobs, -0.25 * pack.tokens * pack.completion_mask, rtol=0, atol=0)


def mixed_completion(pairs: Sequence[tuple[int, Writer]]) -> Completion:
    """A completion of (token, writer) pairs; its engine reports a log-prob of every token."""
    ids, writers = zip(*pairs, strict=True)
    return Completion.of(ids, logprobs=[-0.25 * token for token in ids], writers=writers)


def test_a_mixed_completion_by_hand() -> None:
    tool_call = mixed_completion([(4, "policy"), (5, "tool"), (6, "tool"), (8, "user"), (9, "policy")])
    [pack] = pack_rollouts([Rollout(Prompt((1, 2), "p"), (tool_call, completion([3])))], budget=100)
    assert pack.tokens.tolist() == [1, 2, 4, 5, 6, 8, 9, 3]
    assert pack.completion_mask.tolist() == [False, False, True, False, False, False, True, True]
    assert pack.rollout_logprobs is not None
    assert pack.rollout_logprobs.tolist() == [0, 0, -1.0, 0, 0, 0, -2.25, -0.75]
    assert pack.segments.lengths == (2, 5, 1)


def test_a_group_that_stays_whole_has_the_tokens_of_the_policy_in_the_mask() -> None:
    group = (mixed_completion([(4, "policy"), (5, "tool")]), mixed_completion([(6, "user"), (7, "policy")]))
    [pack] = pack_groups([Rollout(Prompt((1,), "p"), group)], budget=2)
    assert pack.completion_mask.tolist() == [False, True, False, False, True]


def test_a_completion_without_writers_is_the_policy_s() -> None:
    assert completion([4, 5]).policy_tokens == (True, True)
    assert mixed_completion([(4, "tool"), (5, "policy")]).policy_tokens == (False, True)


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


def test_completions_share_a_prompt_only_if_it_dropped_the_same_choices() -> None:
    """-2 - expert is a dropped choice; a prompt that was computed twice has the experts of each time."""
    first, other = torch.tensor([[[3]], [[-5]], [[0]]]), torch.tensor([[[3]], [[1]], [[-2]]])
    records = [torch.cat([prompt, torch.full((2, 1, 1), 4)]).short() for prompt in (first, first, other, other.abs())]
    done = tuple(completion([7, 8], record) for record in records)
    [pack] = pack_rollouts([Rollout(Prompt((1, 2, 3), "p"), done)], budget=100)
    assert pack.segments.lengths == (3, 2, 2, 3, 2, 3, 2)
    assert pack.segments.prefixes == (-1, 0, 0, -1, 3, -1, 5)
    assert pack.routing is not None
    of_prompts = [pack.routing[start : start + 3, 0, 0].tolist() for start in (0, 7, 12)]
    assert of_prompts == [[3, -5, 0], [3, 1, -2], [3, 1, 2]]


@pytest.mark.parametrize("share_prefix", [True, False])
def test_the_record_of_a_cache_follows_its_tokens(share_prefix: bool) -> None:
    rows = torch.arange(7 * 2 * 3, dtype=torch.uint8).view(7, 2, 3)
    completions = (replace(completion([5, 6, 7]), kv_record=rows[:6]), completion([8]))
    [pack] = pack_rollouts(
        [Rollout(Prompt((1, 2, 3), ""), completions, (0.0, 0.0))], budget=100, share_prefix=share_prefix
    )
    missing = torch.zeros(1 if share_prefix else 4, 2, 3, dtype=torch.uint8)
    assert pack.kv_record is not None and torch.equal(pack.kv_record, torch.cat((rows[:6], missing)))
