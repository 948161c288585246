"""Dropout of the residual stream acts where no log-probs are compared, and resumed runs go on with its numbers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainers.conftest import DENSE
from tests.trainers.tiny import CASES, make_case

DROPPING = {**DENSE, "residual_dropout": 0.3}
FIXED_TEXTS = ("sft", "distill")


@pytest.fixture
def make(make_model: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> Callable[..., Any]:
    def make(name: str, folder: str, architecture: dict[str, Any] = DROPPING, **changes: Any) -> Any:
        return make_case(name, tmp_path / folder, make_model(architecture), tokenizer, **changes)

    return make


@pytest.mark.parametrize("name", CASES)
def test_trainers_that_compare_logprobs_switch_it_off(
    name: str, make: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="alignlab.models.dropout"):
        trainer = make(name, "run")
    kept = name.partition("_")[0] in FIXED_TEXTS
    layers = [m for m in trainer.learner.model.modules() if hasattr(m, "residual_dropout")]
    assert {layer.residual_dropout for layer in layers} == {0.3 if kept else 0.0}
    assert ("residual_dropout 0.3" in caplog.text) != kept


@pytest.mark.parametrize("name", FIXED_TEXTS)
def test_a_resumed_run_drops_what_an_uninterrupted_one_drops(name: str, make: Callable[..., Any]) -> None:
    checkpointed = {"memory": {"gradient_checkpointing": True}}
    whole = make(name, "whole", **checkpointed)
    whole.train()
    plain = make(name, "plain", DENSE)
    plain.train()
    make(name, "cut", num_steps=2, **checkpointed).train()
    torch.manual_seed(99)
    resumed = make(name, "cut", **checkpointed)
    torch.rand(7)
    resumed.train(resume=True)
    differs = 0.0
    for key, weight in whole.learner.trained.items():
        assert torch.equal(weight, resumed.learner.trained[key]), key
        differs = max(differs, float((weight - plain.learner.trained[key]).detach().abs().max()))
    assert differs > 1e-4, "the dropout changes what is learnt"


def test_held_out_examples_are_measured_without(make: Callable[..., Any]) -> None:
    trainer, plain = make("sft", "run"), make("sft", "plain", DENSE)
    trainer.learner.module.train()
    packs = trainer.algorithm.packs("train", trainer.train_examples, range(4))
    for logprobs, expected in zip(trainer.learner.logprobs(packs), plain.learner.logprobs(packs), strict=True):
        assert torch.equal(logprobs, expected)
