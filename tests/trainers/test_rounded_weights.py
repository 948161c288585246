"""Training on rollouts of an engine with rounded weights."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

from alignlab.config.model import LoraSettings
from alignlab.trainers.grpo import GRPOTrainer
from tests.trainers.conftest import even_ids
from tests.trainers.steps import weights_of

Make = Callable[..., Any]


@pytest.mark.parametrize("kind", ["int8", {"type": "int4", "exact": []}, "int8_dynamic"], ids=str)
def test_a_step_on_rounded_rollouts_is_weighted(
    kind: Any, make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    config = make_config(
        rollout={"quantization": kind}, mismatch={"correction": "icepop", "low": 0.9995, "high": 1.0005}
    )
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
    trainer.train_step(1)
    metrics = trainer.train_step(2)
    kept = [value for name, value in metrics.items() if name.startswith("mismatch_kept/")]
    assert metrics["rollout_gap"] > 1e-4 and min(kept) < 1
    assert metrics["engine/rounding_s"] > 0


def test_a_resumed_run_rounds_as_an_uninterrupted_one(
    make_model: Make, make_config: Make, tokenizer: Any, rows: Any, tmp_path: Any
) -> None:
    def stop(trainer: Any, step: int, metrics: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    def make(folder: str, *callbacks: Any, **changes: Any) -> GRPOTrainer:
        rollout = {"quantization": "int8"} | changes
        config = make_config(output_dir=tmp_path / folder, num_steps=3, rollout=rollout)
        return GRPOTrainer(
            make_model(), even_ids, config, rows, tokenizer=tokenizer, peft_config=LoraSettings(rank=4),
            callbacks=callbacks,
        )  # fmt: skip

    whole = make("whole")
    whole.train()
    assert make("stopped", stop).train().interrupted
    resumed = make("stopped")
    resumed.train(resume=True)
    weights, expected = weights_of(resumed), weights_of(whole)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    exact = make("exact", quantization=None)
    exact.train()
    other = weights_of(exact)
    assert not all(torch.equal(weights[name], other[name]) for name in expected)
