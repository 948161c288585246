import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from alignlab.functional import advantages
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
