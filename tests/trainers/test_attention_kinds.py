"""A step of GRPO with each kind of attention: the trainer's log-probs are the engine's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from alignlab.config.model import LoraSettings
from alignlab.trainers.grpo import GRPOTrainer
from tests.models.attention_kinds import KINDS, SHAPE
from tests.trainers.conftest import even_ids


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)], ids=["full", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_update_is_on_policy(
    kind: str, lora: Any, make_model: Callable[..., Any], make_config: Callable[..., Any], tokenizer: Any, rows: Any
) -> None:
    gaps: list[float] = []
    config = make_config(num_steps=2, num_epochs=1)
    model = make_model({**SHAPE, **KINDS[kind]})
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trainer = GRPOTrainer(
        model, even_ids, config, rows, tokenizer=tokenizer, peft_config=lora,
        callbacks=[lambda _, __, metrics: gaps.append(metrics["rollout_gap"])],
    )
    metrics = trainer.train().metrics
    assert metrics["ratio"] == pytest.approx(1, abs=1e-5)
    assert max(gaps) < 1e-5 and len(gaps) == 2, "before and after an update"
    assert metrics["grad_norm"] > 1e-3
    if lora is None:
        moved = [name for name, weight in model.named_parameters() if (weight - before[name]).abs().max() > 0]
        assert {name for name in before if "self_attn" in name} <= set(moved)
