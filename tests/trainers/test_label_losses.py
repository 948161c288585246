"""Label smoothing and z-loss in supervised fine-tuning and in distillation on fixed texts, by plain forward passes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from alignlab.config.trainers import DistillConfig, DPOConfig, GKDConfig, GRPOConfig, KTOConfig, RewardConfig, SFTConfig
from alignlab.data.examples import Example
from alignlab.errors import ConfigError
from tests.trainers.conftest import DENSE, SPARSE
from tests.trainers.steps import packs_of
from tests.trainers.tiny import examples, make_case

Make = Callable[..., Any]


@pytest.fixture
def make(make_model: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))

    def make(name: str, architecture: Any = DENSE, folder: str = "run", **options: Any) -> Any:
        return make_case(name, tmp_path / folder, make_model(architecture), tokenizer, **options)

    return make


def logits_of(model: Any, example: Example) -> tuple[Tensor, Tensor]:
    """Return the logits of the taught tokens by a plain forward pass, and these tokens."""
    ids, mask = torch.tensor(example.token_ids), torch.tensor(example.completion_mask)
    return model(input_ids=ids[None]).logits[0, :-1][mask[1:]].float(), ids[mask]


def plain_cross_entropy(model: Any, data: list[Example], label_smoothing: float) -> Tensor:
    """Return the mean over all taught tokens, an example at a time."""
    parts = [
        torch.nn.functional.cross_entropy(*logits_of(model, example), reduction="none", label_smoothing=label_smoothing)
        for example in data
    ]
    return torch.cat(parts).mean()


def log_normalizers(model: Any, data: list[Example]) -> Tensor:
    """Return log Z of the distribution of each taught token."""
    return torch.cat([logits_of(model, example)[0].logsumexp(-1) for example in data])


def step_of(trainer: Any, rows: range) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return metrics and gradients of an update that is not made."""
    gradients: dict[str, Tensor] = {}

    def keep(*_: Any) -> dict[str, float]:
        gradients.update({n: p.grad.clone() for n, p in trainer.learner.trained.items() if p.grad is not None})
        trainer.learner.strategy.clear()
        return {}

    trainer.learner._step = keep
    metrics = trainer.learner.update(packs_of(trainer, rows), trainer.algorithm.loss, trainer.algorithm.loss_weights)
    return metrics, gradients


@pytest.mark.parametrize("budget", [10, 4096])
def test_fine_tuning_is_a_plain_loss_however_it_is_cut(budget: int, make: Make) -> None:
    memory = {"tokens_per_microbatch": budget, "logprob_chunk_tokens": 3}
    trainer = make("sft", label_smoothing=0.2, z_loss_coef=0.01, memory=memory)
    metrics, gradients = step_of(trainer, range(8))
    model = trainer.learner.model
    log_z = log_normalizers(model, examples(8))
    expected = plain_cross_entropy(model, examples(8), 0.2) + 0.01 * log_z.square().mean()
    assert metrics["log_normalizer"] == pytest.approx(log_z.mean().item(), rel=1e-5)
    expected.backward()
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["cross_entropy"] == pytest.approx(plain_cross_entropy(model, examples(8), 0.0).item(), rel=1e-5)
    assert metrics["loss"] != pytest.approx(metrics["cross_entropy"], rel=1e-3)
    for name, gradient in gradients.items():
        weight = model.get_parameter(name.removeprefix("model."))
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_held_out_loss_is_of_labels_as_they_are(make: Make) -> None:
    plain, smoothed = (make("sft", folder=f"run{eps}", label_smoothing=eps).evaluate() for eps in (0.0, 0.5))
    assert plain == smoothed


def test_z_loss_of_a_distillation_is_of_the_student(make: Make) -> None:
    """Whatever the weight of the labels."""
    for weight in (0.0, 0.5):
        trainer = make("distill", folder=f"run{weight}", hard_label_weight=weight, z_loss_coef=0.01)
        without = make("distill", folder=f"without{weight}", hard_label_weight=weight)
        (metrics, gradients), (expected, _) = (step_of(each, range(8)) for each in (trainer, without))
        log_z = log_normalizers(trainer.learner.model, examples(8))
        assert metrics["loss"] - expected["loss"] == pytest.approx(0.01 * log_z.square().mean().item(), rel=1e-3)
        assert metrics["log_normalizer"] == pytest.approx(log_z.mean().item(), rel=1e-5)
        assert "log_normalizer" not in expected
        plain_gradients = step_of(without, range(8))[1]
        (0.01 * log_z.square().mean()).backward()
        for name, gradient in gradients.items():
            added = trainer.learner.model.get_parameter(name.removeprefix("model.")).grad
            torch.testing.assert_close(gradient, plain_gradients[name] + added, rtol=1e-4, atol=1e-6, msg=name)


def test_hard_labels_of_a_distillation_are_smoothed(make: Make) -> None:
    """(1 - w) divergence + w cross-entropy: the difference of two weights leaves what is known."""
    losses = {
        weight: step_of(
            make("distill", folder=f"run{weight}", hard_label_weight=weight, label_smoothing=0.3), range(8)
        )[0]
        for weight in (0.25, 0.75)
    }
    trainer = make("distill", folder="plain")
    expected = plain_cross_entropy(trainer.learner.model, examples(8), 0.3).item()
    divergence = losses[0.25]["divergence"]
    for weight, metrics in losses.items():
        assert metrics["loss"] == pytest.approx((1 - weight) * divergence + weight * expected, rel=1e-5)


def test_a_router_that_learns_by_reinforce_learns_from_smoothed_labels(make: Make) -> None:
    """The weight of the router's own loss changes its gradient."""
    gradients = []
    for coef in (0.01, 10.0):
        architecture = SPARSE | {"router_type": "reinforce", "router_reinforce_coef": coef}
        trainer = make("sft", architecture, folder=f"run{coef}", label_smoothing=0.2)
        torch.manual_seed(3)  # the router samples
        gradients.append(step_of(trainer, range(8))[1])
    [name] = [name for name in gradients[0] if name.endswith("router.weight") or name.endswith("gate.weight")]
    assert not torch.allclose(gradients[0][name], gradients[1][name])


@pytest.mark.parametrize("field", ["label_smoothing", "z_loss_coef"])
@pytest.mark.parametrize(
    "config", [GRPOConfig, KTOConfig, RewardConfig, lambda **options: GKDConfig(teacher={"name": "t"}, **options)]
)
def test_trainers_without_labels_have_neither(config: Any, field: str) -> None:
    with pytest.raises(ConfigError, match=rf"{field} is not a setting"):
        config(**{field: 0.1})


def test_settings() -> None:
    assert DPOConfig(label_smoothing=0.1).label_smoothing == 0.1  # of preferences: another thing by the same name
    with pytest.raises(ConfigError, match=r"label_smoothing is 1\.0"):
        SFTConfig(label_smoothing=1.0)
    with pytest.raises(ConfigError, match=r"label_smoothing_factor.* label_smoothing"):
        SFTConfig(label_smoothing_factor=0.1)
    with pytest.raises(ConfigError, match=r"label_smoothing is 0\.1, and must stay 0\.0 with hard_label_weight 0"):
        DistillConfig(teacher={"name": "t"}, label_smoothing=0.1)
    with pytest.raises(ConfigError, match=r"z_loss_coef is -0\.1"):
        SFTConfig(z_loss_coef=-0.1)
    assert SFTConfig().method == "sft"
    assert SFTConfig(label_smoothing=0.1).method == "sft (label smoothing 0.1)"
    assert SFTConfig(label_smoothing=0.1, z_loss_coef=1e-4).method == "sft (label smoothing 0.1, z-loss 0.0001)"


def test_the_metrics_of_a_run_say_both(make: Make) -> None:
    trainer = make("sft", label_smoothing=0.1)
    trainer.train()
    lines = (Path(trainer.config.output_dir) / "metrics.jsonl").read_text().splitlines()
    steps = [line for line in map(json.loads, lines) if "loss" in line]
    assert len(steps) == 3 and all(line["cross_entropy"] < line["loss"] for line in steps)
