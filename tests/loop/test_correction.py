"""The correction of the gap between engine and trainer: its choice, its weights in the loss, and its metrics."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from alignlab.config.model import LoraSettings
from alignlab.config.online import MISMATCH_BOUNDS
from alignlab.config.rollout import RolloutSettings, VLLMSettings
from alignlab.config.trainers import GRPOConfig, MismatchSettings
from alignlab.errors import ConfigError
from alignlab.loop.correction import Correction, choose_correction, kept_by_length, kept_fractions
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.types import Experience, Segments
from tests.trainers.conftest import even_ids
from tests.trainers.steps import minibatches_of

Make = Callable[..., Any]
VLLM, EMBEDDED = VLLMSettings(), RolloutSettings()
INT8_ALONE = RolloutSettings(kv_cache={"type": "int8", "replay": False})


@pytest.mark.parametrize(
    ("engine", "dtype", "sparse", "expected"),
    [
        (EMBEDDED, torch.bfloat16, True, Correction("none")),
        (RolloutSettings(kv_cache={"type": "int8"}), torch.bfloat16, False, Correction("none")),
        (INT8_ALONE, torch.float32, False, Correction("token_tis", None, 2.0)),
        (INT8_ALONE, torch.float32, True, Correction("icepop", 0.5, 5.0)),
        (VLLM, torch.float32, True, Correction("none")),
        (VLLM, torch.bfloat16, False, Correction("token_tis", None, 2.0)),
        (VLLM, torch.bfloat16, True, Correction("icepop", 0.5, 5.0)),
        (RolloutSettings(quantization="int8"), torch.float32, False, Correction("token_tis", None, 2.0)),
        (RolloutSettings(quantization="int4"), torch.float32, True, Correction("icepop", 0.5, 5.0)),
        (VLLMSettings(kv_cache="fp8"), torch.float32, False, Correction("token_tis", None, 2.0)),
        (VLLMSettings(quantization="fp8"), torch.float32, False, Correction("token_tis", None, 2.0)),
        (VLLMSettings(quantization="fp8"), torch.float16, True, Correction("icepop", 0.5, 5.0)),
    ],
)
def test_default_correction_fits_engine_precision_and_model(
    engine: Any, dtype: Any, sparse: bool, expected: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A default that changes the loss is logged as a warning."""
    assert choose_correction(MismatchSettings(), engine, dtype, sparse=sparse) == expected
    warnings = [f"mismatch correction: {expected.name}" in record.message for record in caplog.records]
    assert warnings == ([] if expected.name == "none" else [True])


def test_configured_correction_and_bounds_win_over_the_default() -> None:
    settings = MismatchSettings(correction="icepop", low=0.8)
    assert choose_correction(settings, EMBEDDED, torch.float32, sparse=False) == Correction("icepop", 0.8, 5.0)
    with pytest.raises(ConfigError, match=r"low is 0\.5, and must stay null with correction token_tis"):
        MismatchSettings(correction="token_tis", low=0.5)
    with pytest.raises(ConfigError, match=r"high is 3\.0, and must stay null with correction auto"):
        MismatchSettings(high=3.0)


def test_lower_bound_of_0_differs_from_the_default_bound() -> None:
    settings = MismatchSettings(correction="sequence_mis", low=0.0, high=3.0)
    assert choose_correction(settings, EMBEDDED, torch.float32, sparse=False) == Correction("sequence_mis", 0.0, 3.0)


@pytest.mark.parametrize("name", MISMATCH_BOUNDS)
def test_weights_multiply_the_policy_gradient(
    name: Any, make_model: Make, make_config: Make, tokenizer: Any, rows: Any
) -> None:
    """Each token's corrected loss is the plain loss times the token's weight; the KL term has no weight."""

    def losses(correction: str) -> tuple[Any, Any]:
        config: GRPOConfig = make_config(mismatch={"correction": correction}, kl={"coef": 0.5}, num_epochs=1)
        trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer)
        rollouts = trainer.source.collect(1).rollouts
        [[pack]] = minibatches_of(trainer, 1, rollouts)
        mu = pack.rollout_logprobs + torch.sin(pack.tokens.float()) * pack.completion_mask
        pack = replace(pack, rollout_logprobs=mu)
        output = trainer.learner.module(pack.tokens, pack.segments, pack.completion_mask)
        weights = trainer.algorithm.objective.correction.weights(output.logprobs.detach(), pack)
        return trainer.algorithm.loss(output, pack)[0].detach(), weights

    (plain, _), (corrected, weights) = losses("none"), losses(name)
    assert int((weights != 1).sum()) > 0
    torch.testing.assert_close(corrected, plain * weights)  # the KL to the reference is 0 at the start


def test_kept_fractions_by_length() -> None:
    """Two completions, of 2 and of 8 tokens with a limit of 8; half of the long one is kept."""
    segments = Segments((3, 2, 8), (-1, 0, 0), (-1, 0, 1), (0, 0, 0))
    mask = torch.tensor([False] * 3 + [True] * 10)
    pack = Experience(torch.zeros(13, dtype=torch.long), segments, mask)
    weights = torch.ones(13)
    weights[-4:] = 0
    masks = kept_by_length(weights, pack, max_tokens=8)
    means = {name: float(values[mask].mean()) for name, values in masks.items()}
    assert kept_fractions(means | {"loss": 3.0}) == {
        "loss": 3.0, "mismatch_kept/first_quarter": 1.0, "mismatch_kept/fourth_quarter": 0.5,
    }


def test_metrics_hold_the_kept_fractions(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    metrics = GRPOTrainer(make_model(), even_ids, make_config(num_steps=1), rows, tokenizer=tokenizer).train().metrics
    fractions = [value for name, value in metrics.items() if name.startswith("mismatch_kept/")]
    assert fractions and fractions == [1.0] * len(fractions)
    assert not any("_of/" in name for name in metrics)


def test_dropout_of_adapters_causes_no_mismatch(make_model: Make, make_config: Make, tokenizer: Any, rows: Any) -> None:
    config = make_config(num_steps=1, mismatch={"correction": "icepop", "low": 0.999, "high": 1.001})
    lora = LoraSettings(rank=4, dropout=0.5)
    trainer = GRPOTrainer(make_model(), even_ids, config, rows, tokenizer=tokenizer, peft_config=lora)
    with torch.no_grad():
        for name, weight in trainer.learner.trained.items():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    trainer.source.engine.update_weights(1)
    metrics = trainer.train().metrics
    assert metrics["rollout_gap"] < 1e-5
    assert all(value == 1.0 for name, value in metrics.items() if name.startswith("mismatch_kept/"))
