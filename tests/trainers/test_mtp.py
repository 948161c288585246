"""Multi-token prediction in trainers: trained by those that say so, refused by the others before a step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import ConfigError
from alignlab.trainers.grpo import GRPOTrainer
from tests.models.attention_kinds import SHAPE
from tests.trainers.conftest import even_ids
from tests.trainers.tiny import CASES, make_case


def test_grpo_trains_the_layer_beside_the_policy(
    make_model: Callable[..., Any], make_config: Callable[..., Any], tokenizer: Any, rows: Any
) -> None:
    model = make_model({**SHAPE, "num_mtp_layers": 1, "mtp_detach": True})
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    losses: list[float] = []
    trainer = GRPOTrainer(
        model, even_ids, make_config(num_steps=2), rows, tokenizer=tokenizer,
        callbacks=[lambda _, __, metrics: losses.append(metrics["mtp_loss"])],
    )
    trainer.train()
    # At the start a guess: 0.1 of the log of the vocabulary, about.
    assert len(losses) == 2 and all(0.05 < loss < 2 for loss in losses)
    assert all((weight - before[name]).abs().max() > 0 for name, weight in model.named_parameters() if "mtp." in name)


REFUSING = [name for name in CASES if not name.startswith(("sft", "grpo", "on_policy_distill"))]


@pytest.mark.parametrize("name", REFUSING)
def test_other_trainers_refuse_the_layer(
    name: str, tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    model = make_model({**SHAPE, "num_mtp_layers": 1})
    with pytest.raises(ConfigError, match=r"num_mtp_layers is 1, and .* does not train multi-token prediction"):
        make_case(name, tmp_path / "run", model, tokenizer)
