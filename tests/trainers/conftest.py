"""A tiny policy with its tokenizer, and a task that the policy can learn within seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainers import GRPOConfig
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.models.hub.checkpoints import new_model
from tests.settings import merged

DENSE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
SPARSE = DENSE | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "mlp_layer_types": ["dense", "sparse"],
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["abc abd ab ba 123"], vocab_size=262)


@pytest.fixture
def make_model(tokenizer: PreTrainedTokenizerBase) -> Callable[..., PreTrainedModel]:
    def make(architecture: dict[str, Any] = DENSE, seed: int = 0) -> PreTrainedModel:
        torch.manual_seed(seed)
        return new_model(
            architecture,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )

    return make


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., GRPOConfig]:
    def make(**changes: Any) -> GRPOConfig:
        base: dict[str, Any] = {
            "output_dir": tmp_path / "run",
            "num_steps": 4,
            "optim": {"learning_rate": 1e-2},
            "num_prompts": 2,
            "group_size": 4,
            "sampling": SamplingSettings(max_new_tokens=6),
            "trackers": (),
        }
        return GRPOConfig(**merged(base, changes))

    return make


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    return [{"prompt": f"ab{i}", "answer": str(i)} for i in range(8)]


def even_ids(*, prompts: list[str], completions: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Return the fraction of tokens with an even id: about a half for a random policy, 1 for a trained one."""
    return [sum(token % 2 == 0 for token in ids) / max(len(ids), 1) for ids in completion_ids]


def leave_base(trainer: Any) -> None:
    """Give the adapters weights, with which a model is no longer its base."""
    torch.manual_seed(5)
    with torch.no_grad():
        for name, weight in trainer.learner.module.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.5)
