"""Training in float16: the loss is scaled, gradients are not; an overflow costs time and no update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab import LoraSettings, SFTConfig, SFTTrainer
from alignlab.errors import NumericsError
from alignlab.loop import loss_scale
from alignlab.loop.loss_scale import FIRST, LossScale
from alignlab.loop.loss_weights import token_mean
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.moe import routers
from tests.trainers.conftest import SPARSE
from tests.trainers.tiny import examples

Make = Callable[..., SFTTrainer]


@pytest.fixture
def make(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Make:
    def build(
        dtype: torch.dtype = torch.float16, folder: str = "run", lora: bool = False, **options: Any
    ) -> SFTTrainer:
        config = SFTConfig(
            output_dir=tmp_path / folder, num_sequences=2, trackers=(), num_steps=options.pop("num_steps", 2),
            optim={"learning_rate": 1e-3, "max_grad_norm": 1e9} | options, checkpoints={"every_steps": 1},
        )
        adapter = LoraSettings(rank=2) if lora else None
        model = make_model().to(dtype)
        return SFTTrainer(model, config, examples(8), tokenizer=tokenizer, peft_config=adapter)

    return build


def gradients_of(trainer: SFTTrainer, factor: float | None = None, weight: float = 1.0) -> dict[str, torch.Tensor]:
    """Gradients of a first step, whose loss has a weight."""
    learner = trainer.learner
    if factor is not None:
        learner.loss_scale.factor = factor
    packs = trainer.algorithm.packs("train", trainer.train_examples, [0, 1])
    kept: dict[str, torch.Tensor] = {}
    step = learner.strategy.step

    def keep() -> None:
        kept.update({name: p.grad.clone() for name, p in learner.trained.items() if p.grad is not None})
        step()

    learner.strategy.step = keep  # type: ignore[method-assign]
    learner.update(packs, lambda output, pack: (weight * trainer.algorithm.loss(output, pack)[0], {}), token_mean)
    return kept


def relative(ours: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    assert ours.keys() == exact.keys()
    error = sum(float((ours[name] - exact[name]).square().sum()) for name in exact)
    return (error / sum(float(exact[name].square().sum()) for name in exact)) ** 0.5


@pytest.mark.parametrize("lora", [False, True])
def test_the_gradient_is_that_of_float32_whatever_the_scale(make: Make, lora: bool) -> None:
    exact = gradients_of(make(torch.float32, lora=lora))
    for factor in (2.0**6, FIRST):
        ours = gradients_of(make(lora=lora, folder=f"run{factor}"), factor)
        assert {gradient.dtype for gradient in ours.values()} == {torch.float32}
        assert relative(ours, exact) < 1e-2


def test_small_gradients_survive_by_the_scale_alone(make: Make) -> None:
    exact = gradients_of(make(torch.float32), weight=1e-7)
    assert relative(gradients_of(make(), FIRST, weight=1e-7), exact) < 0.05
    assert relative(gradients_of(make(folder="unscaled"), 1.0, weight=1e-7), exact) > 0.5


def test_an_overflow_is_computed_again_and_no_update_is_lost(make: Make) -> None:
    calm, wild = make(folder="calm"), make(folder="wild")
    expected = gradients_of(calm, 2.0**10)
    ours = gradients_of(wild, 2.0**60)
    factor = wild.learner.loss_scale.factor
    assert 1 < factor < 2.0**60 and wild.learner.num_updates == 1 and wild.learner.num_skipped == 0
    assert relative(ours, expected) < 1e-2


def test_a_gradient_that_is_not_finite_stops_the_run(make: Make) -> None:
    trainer = make()
    with pytest.raises(NumericsError):
        gradients_of(trainer, weight=float("inf"))
    assert trainer.learner.loss_scale.factor == FIRST and trainer.learner.num_updates == 0


def test_the_scale_grows_after_many_finite_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_scale, "GROWS_AFTER", 3)
    scale, constant = LossScale(torch.float16), LossScale(torch.bfloat16)
    for _ in range(3):
        assert scale.factor == FIRST
        scale.finite()
        constant.finite()
    assert scale.factor == 2 * FIRST and constant.factor == 1.0
    assert scale.shrink() and scale.factor == FIRST and not constant.shrink()
    other = LossScale(torch.float16)
    scale.finite()
    other.load_state(scale.state())
    assert other.state() == scale.state() == {"factor": FIRST, "num_finite": 1}


def test_a_resumed_run_is_the_uninterrupted_one(make: Make) -> None:
    whole = make(folder="whole", num_steps=4)
    whole.learner.loss_scale.factor = 2.0**60
    result = whole.train()
    assert result.metrics["loss_scale"] == whole.learner.loss_scale.factor < 2.0**60
    first = make(folder="parts", num_steps=2)
    first.learner.loss_scale.factor = 2.0**60
    first.train()
    resumed = make(folder="parts", num_steps=4)
    files = [load_file(r.model_path / "model.safetensors") for r in (result, resumed.train(resume=True))]
    assert resumed.learner.loss_scale.state() == whole.learner.loss_scale.state()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2, experts=True)], ids=["all weights", "adapters of experts"])
def test_a_mixture_in_float16_has_the_gradient_of_float32(
    lora: LoraSettings | None, tokenizer: Any, tmp_path: Path
) -> None:
    """The router's scores and gates are float32 in both, of logits that float16 rounds."""
    gradients, scores = [], []
    for dtype in (torch.float16, torch.float32):
        torch.manual_seed(0)
        model = new_model(SPARSE, vocab_size=len(tokenizer)).half().to(dtype)
        config = SFTConfig(output_dir=tmp_path / str(dtype), num_sequences=2, trackers=())
        trainer = SFTTrainer(model, config, examples(8), tokenizer=tokenizer, peft_config=lora)
        assert trainer.learner.loss_scale.is_needed == (dtype == torch.float16)
        router = routers(trainer.learner.model)[0]
        router.register_forward_hook(lambda module, inputs, output: scores.append(output))
        gradients.append(gradients_of(trainer, None if dtype == torch.float32 else FIRST))
    assert relative(*gradients) < 2e-2
    assert {tensor.dtype for output in scores for tensor in output if tensor is not None} == {torch.float32}
