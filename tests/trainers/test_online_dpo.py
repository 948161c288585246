"""Online DPO: which completions are a pair, the loss by plain forward passes, any cut; learning; resuming."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.rollout import VLLMServerSettings
from alignlab.config.trainers import OnlineDPOConfig
from alignlab.errors import ConfigError
from alignlab.runs.rollout_store import read_rollouts
from alignlab.trainers.online_dpo import OnlineDPOTrainer
from alignlab.types import Rollout
from tests.settings import merged
from tests.trainers.conftest import SPARSE, even_ids, leave_base
from tests.trainers.steps import credit_of, minibatches_of
from tests.trainers.test_dpo import LORA, logprob

Make = Callable[..., Any]


@pytest.fixture
def make_trainer(make_model: Make, tokenizer: Any, rows: Any, tmp_path: Any) -> Callable[..., OnlineDPOTrainer]:
    def make(
        *, architecture: Any = None, lora: Any = LORA, folder: str = "run", callbacks: Any = (), reward: Any = even_ids,
        **changes: Any
    ) -> OnlineDPOTrainer:
        base: dict[str, Any] = {
            "output_dir": tmp_path / folder, "num_steps": 4, "num_prompts": 4, "group_size": 4,
            "optim": {"learning_rate": 1e-2},
            "sampling": {"max_new_tokens": 6}, "trackers": (),
        }
        model = make_model() if architecture is None else make_model(architecture)
        return OnlineDPOTrainer(
            model, reward, OnlineDPOConfig(**merged(base, changes)), rows, tokenizer=tokenizer, peft_config=lora,
            callbacks=callbacks,
        )

    return make


def rewarded(rollout: Rollout, *rewards: float) -> Rollout:
    return replace(rollout, rewards=rewards)


def test_the_pair_is_the_best_and_the_worst(make_trainer: Make) -> None:
    trainer = make_trainer()
    one, *_ = trainer.source.collect(1).rollouts
    nan = math.nan
    assert trainer.algorithm.pair(rewarded(one, 0.2, 0.9, -1.0, 0.5)) == (1, 2)
    assert trainer.algorithm.pair(rewarded(one, nan, 0.1, 0.3, nan)) == (2, 1), "a failed reward is no bad one"
    assert trainer.algorithm.pair(rewarded(one, 1.0, 1.0, 0.0, 0.0)) == (0, 2), "the first of equals"
    for rewards in ((0.5,) * 4, (nan, nan, nan, 1.0), (nan,) * 4):
        assert trainer.algorithm.pair(rewarded(one, *rewards)) is None


def test_truncated_completions_are_left_out_on_request(make_trainer: Make) -> None:
    for masked, expected in ((False, (0, 3)), (True, (1, 2))):
        trainer = make_trainer(mask_truncated=masked)
        one = rewarded(trainer.source.collect(1).rollouts[0], 1.0, 0.8, 0.2, 0.0)
        reasons = ("length", "stop", "stop", "length")
        completions = [replace(c, finish_reason=r) for c, r in zip(one.completions, reasons, strict=True)]
        assert trainer.algorithm.pair(replace(one, completions=tuple(completions))) == expected


def test_ties_and_failures_are_skipped_and_counted(make_trainer: Make) -> None:
    trainer = make_trainer()
    found = trainer.source.collect(1).rollouts
    nan = math.nan
    values = ((0.0, 1.0, 0.5, 0.5), (1.0,) * 4, (nan, nan, 1.0, nan), (nan, 1.0, 0.0, 2.0))
    rollouts = [rewarded(rollout, *each) for rollout, each in zip(found, values, strict=True)]
    credit = credit_of(trainer, 1, rollouts)
    [packs] = credit.minibatches
    assert credit.metrics == {"num_pairs": 2, "groups_tied": 1, "groups_unrewarded": 1}
    assert credit.advantages.tolist() == [[-1, 1, 0, 0], [0] * 4, [0] * 4, [0, 0, -1, 1]]
    sequences = [s for pack in packs for s in pack.segments.sequence_ids if s >= 0]
    assert sorted(sequences) == [0, 1, 2, 3], "nothing but the pairs is computed"


def test_step_without_a_pair_changes_no_weight(make_trainer: Make) -> None:
    trainer = make_trainer(reward=lambda *, completions, **_: [1.0] * len(completions))
    before = {name: p.detach().clone() for name, p in trainer.learner.trained.items()}
    metrics = trainer.train_step(1)
    assert metrics["num_pairs"] == 0 and metrics["groups_tied"] == 4 and metrics["empty_updates"] == 1
    assert "loss" not in metrics and "preference_accuracy" not in metrics, "none is not 0"
    for name, value in trainer.learner.trained.items():
        assert torch.equal(value, before[name])


def test_minibatches_without_a_pair_do_not_count_as_losses_of_0(make_trainer: Make) -> None:
    def half_tied(*, prompts: Any, completions: Any, **_: Any) -> list[float]:
        tied = prompts[: len(prompts) // 2]
        return [0.0 if prompt in tied else float(i) for i, prompt in enumerate(prompts)]

    trainer = make_trainer(reward=half_tied, num_minibatches=4, optim={"learning_rate": 1e-9})
    metrics = trainer.train_step(1)
    assert metrics["num_pairs"] == 2 and metrics["empty_updates"] == 2
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-4) and metrics["preference_accuracy"] == 0.5


def gradients(trainer: OnlineDPOTrainer, packs: Any) -> tuple[dict[str, float], dict[str, Tensor]]:
    found: dict[str, Tensor] = {}
    trainer.learner.module.zero_grad()
    step, trainer.learner._step = trainer.learner._step, lambda *_: (
        found.update({n: p.grad.clone() for n, p in trainer.learner.trained.items()}), {}
    )[1]
    metrics = trainer.algorithm.update(1, packs)
    trainer.learner._step = step
    return metrics, found


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "simpo"])
@pytest.mark.parametrize("budget", [1, 4096])
def test_loss_and_gradient_are_those_of_plain_forward_passes(loss: str, budget: int, make_trainer: Make) -> None:
    trainer = make_trainer(
        loss=loss, memory={"tokens_per_microbatch": budget}, sampling={"max_new_tokens": 6, "temperature": 1.0}
    )
    leave_base(trainer)
    trainer.source.engine.update_weights(1)
    rollouts = trainer.source.collect(1).rollouts
    rollouts[1] = rewarded(rollouts[1], 1.0, 1.0, 1.0, 1.0)
    model, beta = trainer.learner.model, trainer.config.beta
    trainer.learner.module.zero_grad()
    total, count = torch.zeros(()), 0
    for rollout in rollouts:
        low, high = min(rollout.rewards), max(rollout.rewards)
        if low == high:
            continue
        ids = [rollout.completions[rollout.rewards.index(value)].token_ids for value in (high, low)]
        with torch.no_grad(), model.disable_adapter():
            ref = [logprob(model, rollout.prompt.token_ids, each).sum() for each in ids]
        own = [logprob(model, rollout.prompt.token_ids, each) for each in ids]
        margin = own[0].sum() - own[1].sum() - (ref[0] - ref[1])
        total, count = total + {
            "sigmoid": lambda m=margin: -torch.log(torch.sigmoid(beta * m)),
            "ipo": lambda m=margin: (m - 1 / (2 * beta)) ** 2,
            "simpo": lambda o=own: -torch.log(torch.sigmoid(beta * (o[0].mean() - o[1].mean()) - 1.0)),
        }[loss](), count + 1
    assert 1 < count < 4
    (total / count).backward()
    expected = {n: p.grad.clone() for n, p in trainer.learner.trained.items()}
    [packs] = minibatches_of(trainer, 1, rollouts)
    assert len(packs) == (count if budget == 1 else 1)
    metrics, found = gradients(trainer, packs)
    assert metrics["loss"] == pytest.approx(total.item() / count, rel=1e-4)
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5 * largest)


@pytest.mark.parametrize("lora", [LORA, None], ids=["adapter", "copy"])
def test_the_loss_starts_at_log_two_and_rollouts_are_kept(lora: Any, make_trainer: Make, tmp_path: Any) -> None:
    seen: list[Any] = []
    make_trainer(lora=lora, num_steps=2, callbacks=[lambda t, s, m: seen.append(dict(m))]).train()
    assert seen[0]["loss"] == pytest.approx(math.log(2), rel=1e-4)
    kept = read_rollouts(tmp_path / "run" / "rollouts").to_pylist()
    assert len(kept) == 2 * 16
    for row in kept:
        group = [r for r in kept if (r["step"], r["prompt_index"]) == (row["step"], row["prompt_index"])]
        if row["advantage"] == 1:
            assert row["reward"] == max(r["reward"] for r in group) > min(r["reward"] for r in group)
        if row["advantage"] == -1:
            assert row["reward"] == min(r["reward"] for r in group)
    assert sum(row["advantage"] == 1 for row in kept) == sum(m["num_pairs"] for m in seen) > 0


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_policy_learns_rewarded_completions(loss: str, make_trainer: Make) -> None:
    seen: list[float] = []
    trainer = make_trainer(
        loss=loss, lora=None, num_steps=40, num_prompts=8, num_epochs=2, num_minibatches=2,
        callbacks=[lambda t, s, m: seen.append(m["reward"])],
    )
    trainer.train()
    first, last = sum(seen[:3]) / 3, sum(seen[-3:]) / 3
    assert first < 0.65 and last > 0.85


def test_mixture_of_experts_trains_with_its_own_routing(make_trainer: Make) -> None:
    trainer = make_trainer(architecture=SPARSE, lora=None)
    [packs] = minibatches_of(trainer, 1, trainer.source.collect(1).rollouts)
    assert all(pack.routing is None for pack in packs)
    metrics = trainer.algorithm.update(1, packs)
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-3) and math.isfinite(metrics["grad_norm"])


def test_settings() -> None:
    with pytest.raises(ConfigError, match="group_size"):
        OnlineDPOConfig(group_size=1)
    with pytest.raises(ConfigError, match=r"label_smoothing is 0\.1, and must stay 0\.0 with loss hinge"):
        OnlineDPOConfig(loss="hinge", label_smoothing=0.1)
    with pytest.raises(ConfigError, match=r"sampling\.temperature is 0"):
        OnlineDPOConfig(sampling={"temperature": 0.0})
    assert OnlineDPOConfig(loss="simpo").beta == 2.0 and OnlineDPOConfig().group_size == 2
    ahead = VLLMServerSettings(servers=("http://localhost:1",), max_staleness=2)
    assert OnlineDPOConfig(rollout=ahead).rollout == ahead, "older weights may have sampled a pair"
