"""Hand-computed metrics of rollouts on one rank and on two, with rewards that apply to some completions only."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.loop.rollout_metrics import extremes, reward_range, rollout_metrics
from alignlab.types import Completion, Prompt, Rollout

NAN = math.nan


def rollout(rewards: tuple[float, ...], **parts: tuple[float | None, ...]) -> Rollout:
    completion = Completion.of((5, 6), "x")
    return Rollout(Prompt((1,), "q"), (completion,) * len(rewards), rewards, parts)


def alone(value: Tensor) -> Tensor:
    return value


MATH = rollout((1.0, 0.0), math=(1.0, 0.0), code=(None, None))
CODE = rollout((0.5, NAN), math=(None, None), code=(0.5, None))
NONE = rollout((NAN, NAN), math=(None, None), code=(None, None))


def test_mean_of_a_reward_is_over_the_completions_it_applied_to() -> None:
    metrics = rollout_metrics([MATH, CODE], 0, alone)
    assert (metrics["reward/math"], metrics["reward/code"]) == (0.5, 0.5)
    assert (metrics["applied_frac/math"], metrics["applied_frac/code"]) == (0.5, 0.25)
    assert metrics["accuracy"] == 0.5 and metrics["unrewarded_frac"] == 0.25
    assert metrics["reward"] == 0.5 and metrics["reward_std"] == pytest.approx(math.sqrt(1.25 / 3 - 0.25))
    assert metrics["mixed_groups"] == 0.5


def test_reward_that_applied_to_no_completion_has_no_mean() -> None:
    metrics = rollout_metrics([CODE], 0, alone)
    assert "reward/math" not in metrics and "accuracy" not in metrics
    assert metrics["applied_frac/math"] == 0 and metrics["reward/code"] == 0.5
    nothing = rollout_metrics([NONE], 0, alone)
    assert math.isnan(nothing["reward"]) and math.isnan(nothing["reward_std"]) and nothing["unrewarded_frac"] == 1
    assert not {"accuracy", "reward/math", "reward/code"} & nothing.keys() and nothing["mixed_groups"] == 0


def test_ranks_add_sums_and_counts_and_not_means() -> None:
    """One rank holds three rewards of one function, the other a single one of it, and one of another function."""
    first = [rollout((1.0, 1.0, 0.0), math=(1.0, 1.0, 0.0), code=(None, None, None))]
    second = [rollout((0.0, 4.0, NAN), math=(0.0, None, None), code=(None, 4.0, None))]
    vectors: list[Tensor] = []
    for rollouts in (first, second):
        rollout_metrics(rollouts, 0, lambda sums: vectors.append(sums) or sums)  # type: ignore[func-returns-value]
    both = rollout_metrics(first, 0, lambda _: vectors[0] + vectors[1])
    assert both["reward/math"] == 2 / 4 and both["accuracy"] == 2 / 4
    assert both["reward/code"] == 4.0 and both["reward"] == 6 / 5
    assert (both["applied_frac/math"], both["applied_frac/code"]) == (4 / 6, 1 / 6)
    assert both["unrewarded_frac"] == pytest.approx(1 / 6)


def test_groups_of_one_completion_have_no_mixed_groups_metric() -> None:
    assert "mixed_groups" not in rollout_metrics([rollout((1.0,), math=(1.0,))], 0, alone)


def test_trainable_frac_is_of_completions_and_informative_frac_of_groups() -> None:
    trainable, with_signal = torch.tensor([[True, True], [True, False]]), torch.tensor([True, False])
    metrics = rollout_metrics([MATH, CODE], 0, alone, trainable=trainable, with_signal=with_signal)
    assert (metrics["trainable_frac"], metrics["informative_frac"]) == (0.75, 0.5)
    assert not {"trainable_frac", "informative_frac"} & rollout_metrics([MATH], 0, alone).keys()


@pytest.mark.parametrize(
    ("rewards", "rewards_of_other_rank", "expected"),
    [
        ([[1.0, NAN], [0.5, 0.25]], [[2.0, 3.0]], (0.25, 3.0)),
        ([[NAN, NAN]], [[2.0, 2.0]], (2.0, 2.0)),
        ([[NAN, NAN]], [[math.inf, -math.inf]], (math.inf, -math.inf)),
    ],
)
def test_extremes_are_over_all_ranks(
    rewards: Any, rewards_of_other_rank: Any, expected: tuple[float, float]
) -> None:
    def gather(row: Tensor) -> Tensor:
        return torch.cat([row, torch.tensor(rewards_of_other_rank, dtype=row.dtype)])

    assert extremes(torch.tensor(rewards), gather) == expected


def test_reward_range_is_absent_without_rewards() -> None:
    assert reward_range([MATH, CODE], alone) == {"reward_min": 0.0, "reward_max": 1.0}
    assert reward_range([NONE], alone) == {}
