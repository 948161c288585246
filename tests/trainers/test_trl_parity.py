"""The same batch through TRL's trainers: one loss, one gradient, in float32."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from alignlab.config.trainers import DPOConfig, RewardConfig
from alignlab.models.checkpoints import load_model
from alignlab.models.reward_checkpoints import padded_tokenizer, save_reward_model
from alignlab.trainers.dpo import DPOTrainer
from alignlab.trainers.reward import RewardTrainer
from tests.trainers.test_dpo import pairs
from tests.trainers.test_reward import gradients

trl = pytest.importorskip("trl")
# Ours -> TRL's name and settings.
LOSSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "hinge": ({}, {"loss_type": ["hinge"]}),
    "ipo_mean": ({}, {"loss_type": ["ipo"]}),
    "robust": ({"label_smoothing": 0.1}, {"loss_type": ["robust"], "label_smoothing": 0.1}),
}


DATA_OF_REWARDS = [replace(pair, margin=0.25 * (i % 4)) for i, pair in enumerate(pairs(6))]


@pytest.fixture
def checkpoint(tmp_path: Path, tokenizer: Any) -> str:
    """A tiny Llama, which TRL knows."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=len(tokenizer), initializer_range=0.2, max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    return str(tmp_path / "llama")


def move(model: torch.nn.Module) -> None:
    """The policy leaves the reference, in the same way in both."""
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            weight.add_(torch.sin(torch.arange(weight.numel()).float()).view_as(weight) * 0.02 + 0.001 * len(name))


def of_trl(checkpoint: str, tokenizer: Any, settings: dict[str, Any], folder: Path) -> tuple[float, dict[str, Tensor]]:
    from datasets import Dataset

    data = [
        {"prompt_ids": list(p.prompt), "chosen_ids": list(p.chosen), "rejected_ids": list(p.rejected)} for p in pairs(6)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own
        policy, reference = (AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(2))
        config = trl.DPOConfig(
            output_dir=str(folder), use_cpu=True, bf16=False, report_to=[], beta=0.1, gradient_checkpointing=False,
            disable_dropout=True, **settings,
        )
        rows = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 2)
        trainer = trl.DPOTrainer(
            policy, reference, config, train_dataset=rows, processing_class=tokenizer
        )
        move(trainer.model)
        loss = trainer._compute_loss(trainer.model, trainer.data_collator(data), False)
        loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def of_ours(
    checkpoint: str, tokenizer: Any, settings: dict[str, Any], folder: Path
) -> tuple[float, dict[str, Tensor]]:
    config = DPOConfig(
        output_dir=folder, num_pairs=6, beta=0.1, trackers=(), tokens_per_microbatch=40, precompute_reference=False,
        **settings,
    )
    trainer = DPOTrainer(load_model(checkpoint, dtype=torch.float32), config, pairs(6), tokenizer=tokenizer)
    move(trainer.learner.model)
    kept: dict[str, Tensor] = {}

    def keep(*_: Any) -> dict[str, float]:
        kept.update({n: p.grad.clone() for n, p in trainer.learner.model.named_parameters() if p.grad is not None})
        return {}

    trainer.learner._step = keep  # type: ignore[method-assign]
    metrics = trainer.learner.update(trainer.packs(range(6)), trainer.loss, trainer.weigh, measure=trainer.measure)
    return metrics["loss"], kept


@pytest.mark.parametrize("loss", LOSSES)
def test_dpo(loss: str, checkpoint: str, tokenizer: Any, tmp_path: Path) -> None:
    ours, theirs = LOSSES[loss]
    makers: list[Callable[[], tuple[float, dict[str, Tensor]]]] = [
        lambda: of_ours(checkpoint, tokenizer, {"loss": loss} | ours, tmp_path / "ours"),
        lambda: of_trl(checkpoint, tokenizer, theirs, tmp_path / "trl"),
    ]
    (value, gradient), (other, other_gradient) = (make() for make in makers)
    assert value == pytest.approx(other, rel=1e-5)
    assert gradient.keys() == other_gradient.keys()
    largest = max(float(g.abs().max()) for g in gradient.values())
    for name, one in gradient.items():
        torch.testing.assert_close(one, other_gradient[name], rtol=1e-4, atol=1e-5 * largest)


def rewards_of_trl(folder: str, tokenizer: Any, centring: float) -> tuple[float, dict[str, Tensor]]:
    from datasets import Dataset

    data = [
        {"chosen_ids": [*p.prompt, *p.chosen], "rejected_ids": [*p.prompt, *p.rejected], "margin": p.margin}
        for p in DATA_OF_REWARDS
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL's own
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        config = trl.RewardConfig(
            output_dir=f"{folder}/trl", use_cpu=True, bf16=False, report_to=[], gradient_checkpointing=False,
            center_rewards_coefficient=centring, disable_dropout=True,
        )
        rows = Dataset.from_list([{"chosen": "ab", "rejected": "ac"}] * 2)
        trainer = trl.RewardTrainer(model, config, train_dataset=rows, processing_class=tokenizer)
        batch = trainer.data_collator(data)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
    return float(loss.detach()), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_reward(checkpoint: str, tokenizer: Any, tmp_path: Path) -> None:
    """Bradley-Terry with margins and centring, from one head."""
    config = RewardConfig(
        output_dir=tmp_path / "ours", num_pairs=6, trackers=(), tokens_per_microbatch=40, centring_coef=0.05
    )
    trainer = RewardTrainer(
        load_model(checkpoint, dtype=torch.float32), config, DATA_OF_REWARDS, tokenizer=tokenizer
    )
    padded = padded_tokenizer(tokenizer)
    save_reward_model(trainer.reward_model, tmp_path / "head", padded)
    value, found = gradients(trainer, range(6))
    other, expected = rewards_of_trl(str(tmp_path / "head"), padded, 0.05)
    assert value == pytest.approx(other, rel=1e-5)
    # TRL's padding token, whose embedding `transformers` keeps from learning, is in no pair here.
    ours = {name.removeprefix("model.") if name.startswith("model.") else name: g for name, g in found.items()}
    assert ours.keys() == expected.keys()
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, one in ours.items():
        torch.testing.assert_close(one, expected[name], rtol=1e-4, atol=1e-5 * largest)
