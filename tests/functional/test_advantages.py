import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignlab.functional import advantages
from alignlab.functional.reduction import mean_and_variance, moments
from alignlab.functional.values import whitened
from tests.reference import functional as twin

NAN = float("nan")
FUNCTIONS = {
    "normalized": advantages.group_normalized,
    "centered": advantages.group_centered,
    "leave_one_out": advantages.leave_one_out,
    "whitened": advantages.batch_whitened,
}
reward = st.one_of(st.just(NAN), st.floats(-2, 2, width=32))
tables = st.integers(2, 5).flatmap(
    lambda size: st.lists(st.lists(reward, min_size=size, max_size=size), min_size=1, max_size=4)
)


def test_by_hand():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [3.0, 1.0, NAN, NAN]])
    std = math.sqrt(1 / 3)
    torch.testing.assert_close(
        advantages.group_normalized(rewards, eps=0.01),
        torch.tensor(
            [
                [0.5 / (std + 0.01), -0.5 / (std + 0.01), -0.5 / (std + 0.01), 0.5 / (std + 0.01)],
                [1 / (math.sqrt(2) + 0.01), -1 / (math.sqrt(2) + 0.01), 0, 0],
            ]
        ),
    )
    torch.testing.assert_close(
        advantages.group_centered(rewards), torch.tensor([[0.5, -0.5, -0.5, 0.5], [1.0, -1.0, 0.0, 0.0]])
    )
    torch.testing.assert_close(
        advantages.leave_one_out(rewards), torch.tensor([[2 / 3, -2 / 3, -2 / 3, 2 / 3], [2.0, -2.0, 0.0, 0.0]])
    )
    mean, spread = 1.0, math.sqrt((0 + 1 + 1 + 0 + 4 + 0) / 5)
    torch.testing.assert_close(
        advantages.batch_whitened(rewards, eps=0.01),
        torch.where(rewards.isnan(), 0.0, (rewards - mean) / (spread + 0.01)),
    )


@given(tables)
def test_equal_to_the_slow_twin(table):
    rewards = torch.tensor(table, dtype=torch.float64)
    for kind in ("normalized", "centered", "leave_one_out"):
        expected = torch.tensor([twin.group_advantages(group, kind) for group in table], dtype=torch.float64)
        torch.testing.assert_close(FUNCTIONS[kind](rewards), expected, rtol=1e-6, atol=1e-9)
    flat = twin.group_advantages([r for group in table for r in group], "normalized")
    expected = torch.tensor(flat, dtype=torch.float64).reshape(rewards.shape)
    torch.testing.assert_close(advantages.batch_whitened(rewards), expected, rtol=1e-6, atol=1e-9)


@given(tables)
def test_group_advantages_sum_to_zero_and_are_finite(table):
    rewards = torch.tensor(table)
    for kind, function in FUNCTIONS.items():
        result = function(rewards)
        assert result.isfinite().all()
        assert (result[rewards.isnan()] == 0).all()
        total = result.sum() if kind == "whitened" else result.sum(dim=1)
        assert total.abs().max() < 1e-4


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 9))
def test_equal_rewards_give_exactly_zero(value, size):
    rewards = torch.full((3, size), value)
    for function in FUNCTIONS.values():
        assert (function(rewards) == 0).all()


@pytest.mark.parametrize("group", [[NAN, NAN, NAN], [0.7, NAN, NAN]])
def test_fewer_than_two_rewards_have_no_baseline(group):
    for function in FUNCTIONS.values():
        assert function(torch.tensor([group])).tolist() == [[0.0, 0.0, 0.0]]


def test_shifting_a_group_changes_nothing_and_scaling_only_the_unnormalised():
    rewards = torch.rand(4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.tensor([[1.0], [-3.0], [10.0], [0.1]], dtype=torch.float64)
    for kind in ("normalized", "centered", "leave_one_out"):
        torch.testing.assert_close(FUNCTIONS[kind](rewards + shift), FUNCTIONS[kind](rewards))
    torch.testing.assert_close(
        advantages.group_normalized(rewards * 7, eps=0.0), advantages.group_normalized(rewards, eps=0.0)
    )
    torch.testing.assert_close(advantages.leave_one_out(rewards * 7), advantages.leave_one_out(rewards) * 7)


def test_whitening_does_not_tell_prompts_apart():
    rewards = torch.tensor([[1.0, 1.0], [0.0, 0.0]])
    result = advantages.batch_whitened(rewards)
    assert (result[0] > 0).all()
    assert (result[1] < 0).all()


def test_mixed_groups_are_those_with_signal():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [NAN, 1.0, 1.0], [NAN, 0.0, 1.0], [NAN, NAN, NAN]])
    assert advantages.mixed_groups(rewards).tolist() == [False, True, False, True, False]
    assert ((advantages.group_normalized(rewards) != 0).any(dim=1) == advantages.mixed_groups(rewards)).all()


def test_returns_subtract_the_kl_from_each_token_to_the_end_by_hand():
    """Two sequences after a shared prompt; a tool's token, the second of the first one, has neither KL nor return."""
    result = advantages.rewards_to_go(
        torch.tensor([1.0, -2.0]), torch.tensor([9.0, 0.5, 9.0, 0.25, 0.1, -0.3, 9.0]),
        mask=torch.tensor([False, True, False, True, True, True, False]),
        sequence_ids=torch.tensor([-1, 0, 0, 0, 1, 1, 1]), kl_coef=2.0,
    )
    expected = torch.tensor([0.0, 1 - 2 * 0.75, 0.0, 1 - 2 * 0.25, -2 + 2 * 0.2, -2 + 2 * 0.3, 0.0])
    torch.testing.assert_close(result, expected)


def test_whitening_counts_tokens_and_not_completions_by_hand():
    """Rewards 1 and 0 of 3 and of 1 tokens: mean 3/4, unbiased variance 1/4."""
    where = {"mask": torch.ones(4, dtype=torch.bool), "sequence_ids": torch.tensor([0, 0, 0, 1])}
    returns = advantages.rewards_to_go(torch.tensor([1.0, 0.0]), torch.zeros(4), **where, kl_coef=0.0)
    mean, variance = mean_and_variance(moments(returns, where["mask"]))
    assert (mean, variance) == pytest.approx((0.75, 0.25))
    result = whitened(returns, where["mask"], mean=mean, variance=variance)
    assert result.tolist() == pytest.approx([0.5, 0.5, 0.5, -1.5], abs=1e-6)


sequences = st.lists(st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=5), min_size=2, max_size=5)


@given(sequences, st.integers(0, 99), st.permutations(range(5)))
def test_returns_equal_the_slow_twin_in_any_order_of_packs(kls, seed, order):
    draw = torch.Generator().manual_seed(seed)
    rewards = torch.randn(len(kls), generator=draw, dtype=torch.float64)
    expected = [twin.rewards_to_go(r, kl, 0.7) for r, kl in zip(rewards.tolist(), kls, strict=True)]
    packs = [[b for b in order if b < len(kls) and b % 2 == side] for side in (0, 1)]
    found, totals = {}, torch.zeros(3, dtype=torch.float64)
    for members in filter(None, packs):
        ids = torch.tensor([b for b in members for _ in kls[b]])
        kl = torch.tensor([value for b in members for value in kls[b]], dtype=torch.float64)
        mask = torch.ones(len(kl), dtype=torch.bool)
        returns = advantages.rewards_to_go(rewards, kl, mask=mask, sequence_ids=ids, kl_coef=0.7)
        totals += moments(returns, mask)
        found |= {b: (returns[ids == b], mask[ids == b]) for b in members}
    mean, variance = mean_and_variance(totals)
    for b, values in enumerate(expected):
        assert found[b][0].tolist() == pytest.approx(values, abs=1e-9)
    white = twin.whitened(expected, 1e-8)
    for b, (returns, mask) in found.items():
        result = whitened(returns, mask, mean=mean, variance=variance)
        assert result.tolist() == pytest.approx(white[b], rel=1e-6, abs=1e-6)


def test_equal_rewards_without_kl_are_whitened_to_exactly_zero():
    ids = torch.arange(7).repeat_interleave(3)
    mask = torch.ones(21, dtype=torch.bool)
    returns = advantages.rewards_to_go(torch.full((7,), 0.1), torch.zeros(21), mask=mask, sequence_ids=ids, kl_coef=0.0)
    mean, variance = mean_and_variance(moments(returns, mask))
    assert whitened(returns, mask, mean=mean, variance=variance).tolist() == [0.0] * 21
