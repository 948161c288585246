"""REINFORCE++ in a run: returns of tokens, whitened over all tokens of a step, however the step is cut."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.trainers.grpo import GRPOTrainer
from alignlab.types import Experience, Rollout
from tests.loop.test_learner import random_rollouts
from tests.reference import functional as twin
from tests.trainers.conftest import even_ids
from tests.trainers.steps import credit_packs, parts_of

Make = Callable[..., Any]
KL = {"coef": 0.5, "placement": "reward"}


def scored(trainer: GRPOTrainer, rollouts: list[Rollout]) -> list[list[Experience]]:
    """The packs of each mini-batch, with log-probs whose KL depends on the token alone, and not on the cut."""
    packs = [trainer.algorithm.pack(rollouts[part]) for part in parts_of(trainer, rollouts)]
    return [
        [
            replace(pack, old_logprobs=torch.sin(pack.tokens.float()), ref_logprobs=torch.zeros(pack.num_tokens))
            for pack in part
        ]
        for part in packs
    ]


def by_completion(trainer: GRPOTrainer, rollouts: list[Rollout], credited: list[list[Experience]]) -> list[list[float]]:
    """Advantage of each trained token, a list for each completion of the step in order."""
    found: list[list[float]] = []
    for part, packs in zip(parts_of(trainer, rollouts), credited, strict=True):
        own: dict[int, Tensor] = {}
        for pack in packs:
            assert pack.advantages is not None
            assert (pack.advantages[~pack.completion_mask] == 0).all()
            ids = pack.segments.sequence_of_token
            for number in ids[ids >= 0].unique().tolist():
                own[number] = pack.advantages[pack.completion_mask & (ids == number)]
        count = sum(len(rollout.completions) for rollout in rollouts[part])
        found += [own[number].tolist() for number in range(count)]
    return found


def kl_of(rollouts: list[Rollout]) -> list[list[float]]:
    return [[math.sin(token) for token in c.token_ids] for rollout in rollouts for c in rollout.completions]


def expected(rewards: list[float], rollouts: list[Rollout], coef: float) -> list[list[float]]:
    returns = [twin.rewards_to_go(r, kl, coef) for r, kl in zip(rewards, kl_of(rollouts), strict=True)]
    return twin.whitened(returns, 1e-8)


def flat_rewards(rollouts: list[Rollout]) -> list[float]:
    return [float(reward) for rollout in rollouts for reward in rollout.rewards]


@pytest.mark.parametrize(
    "cut", [{}, {"memory": {"tokens_per_microbatch": 20}}, {"num_minibatches": 2}, {"num_minibatches": 4}]
)
@pytest.mark.parametrize("kl", [{}, KL], ids=["no-kl", "kl"])
def test_tokens_are_whitened_over_the_step_whatever_the_cut(
    cut: dict[str, Any], kl: dict[str, Any], make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(recipe="reinforce_pp", num_prompts=4, kl=kl, **cut)
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    rollouts = random_rollouts(seed=5, groups=4)
    means, credited = credit_packs(trainer, rollouts, scored(trainer, rollouts))
    tokens = by_completion(trainer, rollouts, credited)
    expected_credit = expected(flat_rewards(rollouts), rollouts, 0.5 if kl else 0.0)
    for credit, slow in zip(tokens, expected_credit, strict=True):
        assert credit == pytest.approx(slow, abs=2e-5)
    assert means.flatten().tolist() == pytest.approx([sum(own) / len(own) for own in tokens], abs=1e-5)
    everything = torch.tensor([value for own in tokens for value in own])
    assert float(everything.mean()) == pytest.approx(0, abs=1e-5)
    assert float(everything.var()) == pytest.approx(1, abs=1e-4)


def test_with_a_baseline_the_group_s_mean_is_taken_off_before_whitening(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(recipe="reinforce_pp_baseline", num_prompts=3)
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    rollouts = random_rollouts(seed=6)
    _, credited = credit_packs(trainer, rollouts, scored(trainer, rollouts))
    centered = [r - sum(rollout.rewards) / 4 for rollout in rollouts for r in rollout.rewards]
    for credit, slow in zip(by_completion(trainer, rollouts, credited), expected(centered, rollouts, 0.0), strict=True):
        assert credit == pytest.approx(slow, abs=2e-5)


def test_completion_without_a_reward_is_left_out_of_whitening(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(recipe="reinforce_pp", num_prompts=3)
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    rollouts = random_rollouts(seed=7)
    rollouts[1] = replace(rollouts[1], rewards=(math.nan, *rollouts[1].rewards[1:]))
    means, credited = credit_packs(trainer, rollouts, scored(trainer, rollouts))
    assert float(means[1, 0]) == 0.0
    counts = [len(c.token_ids) for rollout in rollouts for c in rollout.completions]
    rewarded = [(r, n) for r, n in zip(flat_rewards(rollouts), counts, strict=True) if not math.isnan(r)]
    slow = iter(twin.whitened([[r] * n for r, n in rewarded], 1e-8))
    for credit, reward in zip(by_completion(trainer, rollouts, credited), flat_rewards(rollouts), strict=True):
        assert credit == ([] if math.isnan(reward) else pytest.approx(next(slow), abs=2e-5))


def test_adaptive_coefficient_changes_after_the_step_is_credited(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(recipe="reinforce_pp", num_prompts=3, kl=KL | {"target": 0.01, "horizon": 100})
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    rollouts = random_rollouts(seed=8)
    _, credited = credit_packs(trainer, rollouts, scored(trainer, rollouts))
    expected_credit = expected(flat_rewards(rollouts), rollouts, 0.5)
    assert by_completion(trainer, rollouts, credited)[0] == pytest.approx(expected_credit[0], abs=2e-5)
    total = sum(sum(kl) for kl in kl_of(rollouts)) / sum(len(kl) for kl in kl_of(rollouts))
    error = min(max(total / 0.01 - 1, -0.2), 0.2)
    assert trainer.algorithm.objective.kl_coef == pytest.approx(0.5 * (1 + error * 12 / 100))


def test_reward_of_a_completion_is_reduced_by_its_total_kl_without_token_advantages(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(recipe="rloo", num_prompts=3, kl=KL)
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    rollouts = random_rollouts(seed=9)
    advantages, _ = credit_packs(trainer, rollouts, scored(trainer, rollouts))
    paid = [r - 0.5 * sum(kl) for r, kl in zip(flat_rewards(rollouts), kl_of(rollouts), strict=True)]
    slow = [twin.group_advantages(paid[4 * p : 4 * p + 4], "leave_one_out") for p in range(3)]
    torch.testing.assert_close(advantages, torch.tensor(slow), rtol=1e-4, atol=1e-5)


def test_reinforce_pp_learns(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    rewards: list[float] = []
    config = make_config(recipe="reinforce_pp", num_steps=30, group_size=16, kl={"coef": 1e-3, "placement": "reward"})
    trainer = GRPOTrainer(
        make_model(), even_ids, config, rows, tokenizer=tokenizer,
        callbacks=[lambda _, __, metrics: rewards.append(metrics["reward"])],
    )
    trainer.train()
    assert sum(rewards[:3]) / 3 < 0.65
    assert sum(rewards[-3:]) / 3 > 0.85
