"""The gradient of an update does not depend on how its batch is cut."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from alignlab.config.trainers import GRPOConfig
from alignlab.data.packing import pack_rollouts
from alignlab.errors import NumericsError
from alignlab.loop.learner import Learner
from alignlab.loop.update_metrics import mean_over_updates
from alignlab.models.policy import Policy, PolicyOutput
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.types import Completion, Experience, Prompt, Rollout
from tests.trainers.conftest import DENSE, SPARSE, even_ids

RECIPES: list[dict[str, Any]] = [
    {"recipe": "grpo"},
    {"recipe": "dr_grpo"},
    {"recipe": "dapo", "kl": {"coef": 0.3, "estimator": "k3"}},
    {"recipe": "rloo", "kl": {"coef": 0.3, "estimator": "k2"}},
    {"recipe": "reinforce_pp", "entropy_coef": 0.1},
    {"recipe": "gspo"},
    {"recipe": "cispo"},
    {"recipe": "grpo", "mismatch": {"correction": "token_tis", "high": 1.05}},
    {"recipe": "dapo", "mismatch": {"correction": "geometric_mask", "low": 0.97, "high": 1.03}},
]


def random_rollouts(seed: int, groups: int = 3, size: int = 4) -> list[Rollout]:
    draw = random.Random(seed)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.randrange(2, 250) for _ in range(draw.randint(low, high)))

    def completion() -> Completion:
        tokens = ids(1, 9)
        return Completion.of(tokens, raw_logprobs=(0.0,) * len(tokens), finish_reason="length")

    return [
        Rollout(
            Prompt(ids(1, 8), "p"), tuple(completion() for _ in range(size)), tuple(draw.random() for _ in range(size))
        )
        for _ in range(groups)
    ]


def experience(
    rollouts: list[Rollout], policy: Policy, advantages: Tensor, *, budget: int, share_prefix: bool
) -> list[Experience]:
    """Packs whose old, reference and rollout log-probs differ from the policy's, the same for every cut."""
    made = []
    for pack in pack_rollouts(rollouts, budget=budget, share_prefix=share_prefix):
        with torch.no_grad():
            logprobs = policy(pack.tokens, pack.segments, pack.completion_mask).logprobs
        shift = torch.sin(pack.tokens.float()) * pack.completion_mask
        per_token = advantages.flatten()[pack.segments.sequence_of_token.clamp(min=0)] * pack.completion_mask
        made.append(
            replace(
                pack, old_logprobs=logprobs + 0.1 * shift, ref_logprobs=logprobs - 0.2 * shift, advantages=per_token,
                rollout_logprobs=logprobs + 0.2 * shift,
            )
        )
    return made


def gradients(trainer: GRPOTrainer, packs: list[Experience], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """What an update would step with."""
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> dict[str, float]:
        gradients.update({name: p.grad.clone() for name, p in trainer.learner.trained.items() if p.grad is not None})
        trainer.learner.optimizer.zero_grad()
        return {}

    monkeypatch.setattr(trainer.learner, "_step", keep)
    trainer.learner.update(packs, trainer.algorithm.loss, trainer.algorithm.loss_weights)
    return gradients


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join([r["recipe"], *r.get("mismatch", {}).keys()]))
@pytest.mark.parametrize("architecture", [DENSE, SPARSE], ids=["dense", "moe"])
def test_gradient_does_not_depend_on_the_cut(
    recipe: dict[str, Any],
    architecture: dict[str, Any],
    make_model: Callable[..., PreTrainedModel],
    make_config: Callable[..., GRPOConfig],
    tokenizer: Any,
    rows: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = make_config(**recipe)
    trainer = GRPOTrainer(make_model(architecture), even_ids, config, rows, tokenizer=tokenizer)
    rollouts = random_rollouts(seed=1)
    advantages = torch.randn(len(rollouts), 4, generator=torch.Generator().manual_seed(2))
    whole = gradients(
        trainer, experience(rollouts, trainer.learner.module, advantages, budget=10_000, share_prefix=True), monkeypatch
    )
    assert max(float(gradient.abs().max()) for gradient in whole.values()) > 1e-4
    for budget, share_prefix in ((10_000, False), (25, True), (25, False), (1, True)):
        packs = experience(rollouts, trainer.learner.module, advantages, budget=budget, share_prefix=share_prefix)
        cut = gradients(trainer, packs, monkeypatch)
        assert cut.keys() == whole.keys()
        for name, gradient in whole.items():
            torch.testing.assert_close(cut[name], gradient, rtol=2e-4, atol=2e-6, msg=f"{name}, budget {budget}")


def test_loss_weights_divide_by_counts_of_the_whole_step(
    make_model: Callable[..., PreTrainedModel], make_config: Any
) -> None:
    """A loss of 1 a token averages to 1 over tokens, whatever the packs."""
    learner = Learner(Policy(make_model()), make_config(), Accelerator(cpu=True), total_updates=1)
    packs = pack_rollouts(random_rollouts(seed=3), budget=20)
    assert len(packs) > 2

    def ones(output: PolicyOutput, pack: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        return output.logprobs * 0 + 1, {"seven": torch.full_like(output.logprobs, 7.0)}

    from alignlab.loop.loss_weights import constant, sequence_mean, token_mean

    tokens = sum(len(c.token_ids) for r in random_rollouts(seed=3) for c in r.completions)
    assert learner.update(packs, ones, token_mean)["loss"] == pytest.approx(1)
    metrics = learner.update(packs, ones, sequence_mean)
    assert metrics["loss"] == pytest.approx(1)
    assert metrics["seven"] == pytest.approx(7)
    assert learner.update(packs, ones, constant(100))["loss"] == pytest.approx(tokens / (12 * 100))


def test_metric_of_a_step_is_the_mean_over_updates_that_have_it() -> None:
    updates = [
        {"learning_rate": 1.0, "loss": 2.0}, {"learning_rate": 3.0, "empty_updates": 4.0},
        {"learning_rate": 5.0, "empty_updates": 4.0, "critic/skipped_updates": 1.0, "loss": 6.0},
        {"learning_rate": 7.0, "empty_updates": 5.0, "critic/skipped_updates": 3.0},
    ]  # fmt: skip
    assert mean_over_updates(updates) == {
        "learning_rate": 4.0, "loss": 4.0, "empty_updates": 5.0, "critic/skipped_updates": 3.0,
    }  # fmt: skip


def test_nonfinite_gradient_raises_with_the_name_of_the_tensor(
    make_model: Callable[..., PreTrainedModel], make_config: Callable[..., GRPOConfig]
) -> None:
    model = make_model()
    learner = Learner(Policy(model), make_config(), Accelerator(cpu=True), total_updates=1)
    before = {name: p.detach().clone() for name, p in learner.trained.items()}
    packs = pack_rollouts(random_rollouts(seed=4), budget=100)

    def broken(output: PolicyOutput, pack: Experience) -> tuple[Tensor, dict[str, Tensor]]:
        return output.logprobs * float("nan"), {}

    from alignlab.loop.loss_weights import token_mean

    with pytest.raises(NumericsError, match=r"not finite: first in model\.model\.embed_tokens\.weight"):
        learner.update(packs, broken, token_mean)
    skipping = Learner(
        Policy(model), make_config(optim={"on_nonfinite": "skip"}), Accelerator(cpu=True), total_updates=1
    )
    assert skipping.update(packs, broken, token_mean)["skipped_updates"] == 1
    for name, p in learner.trained.items():
        assert torch.equal(p, before[name]), name
