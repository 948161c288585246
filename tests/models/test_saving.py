"""Saving without weights writes everything else, and finds what saving would fail at."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from transformers import AutoConfig, MistralConfig, MistralForCausalLM

from alignlab.config.model import LoraSettings
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import CheckpointError
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import empty_model, new_model, save_model
from alignlab.models.hub.reward_checkpoints import padded_tokenizer, save_reward_model, try_reward_model
from alignlab.models.reward_model import RewardModel

TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}


def other_family() -> MistralForCausalLM:
    """A model of a family that `transformers`' own class saves."""
    return MistralForCausalLM(MistralConfig(**TINY, num_key_value_heads=2, vocab_size=30))


@pytest.mark.parametrize("architecture", [TINY, TINY | MOE, TINY | {"attn_logit_softcapping": 4.0}], ids=str)
def test_all_but_the_weights_is_written_as_with_them(architecture: dict[str, Any], tmp_path: Path) -> None:
    model = new_model(architecture, vocab_size=30, eos_token_id=2)
    save_model(model, tmp_path / "whole")
    save_model(model, tmp_path / "without", weights=False)
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "without" / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert not list((tmp_path / "without").glob("*.safetensors"))
    save_model(empty_model(str(tmp_path / "whole")), tmp_path / "empty", weights=False)
    assert AutoConfig.from_pretrained(tmp_path / "empty").vocab_size == 30


def test_an_adapter_is_written_without_its_weights(tmp_path: Path) -> None:
    base = new_model(TINY, vocab_size=30)
    base.config.name_or_path = "some/base"
    save_model(add_lora(base, LoraSettings(rank=2)), tmp_path, weights=False)
    assert not list(tmp_path.glob("*.safetensors"))
    assert PeftConfig.from_pretrained(str(tmp_path)).base_model_name_or_path == "some/base"


@pytest.mark.parametrize("architecture", [TINY, TINY | {"attn_logit_softcapping": 4.0}], ids=str)
def test_a_reward_model_is_tried_on_a_live_model_that_stays_as_it_is(
    architecture: dict[str, Any], tmp_path: Path
) -> None:
    model: Any = new_model(architecture, vocab_size=300, eos_token_id=2)
    tokenizer = train_tokenizer(["ab"] * 9, vocab_size=262)
    before = {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    try_reward_model(model, tmp_path / "tried", padded_tokenizer(tokenizer))
    assert {name: (p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()} == before
    save_reward_model(RewardModel(model), tmp_path / "saved", padded_tokenizer(tokenizer))
    tried, saved = ((tmp_path / folder / "config.json").read_text() for folder in ("tried", "saved"))
    assert tried == saved and not list((tmp_path / "tried").glob("*.safetensors"))


def share_memory(model: Any) -> None:
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = torch.nn.Parameter(layers[0].mlp.up_proj.weight.data)


def hold_an_object(model: Any) -> None:
    model.config.note = object()


def generation_field_in_the_config(model: Any) -> None:
    model.config.temperature = 0.5


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (share_memory, "shared tensors"),
        (hold_an_object, "not JSON serializable"),
        (generation_field_in_the_config, "generation parameters"),
    ],
)
def test_a_model_that_cannot_be_saved_is_named_without_weights(
    spoil: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    model: Any = other_family()
    spoil(model)
    with pytest.raises(CheckpointError, match=message):
        save_model(model, tmp_path, weights=False)


def test_a_buffer_that_no_family_has_is_named_without_weights(tmp_path: Path) -> None:
    model: Any = new_model(TINY, vocab_size=30)
    model.register_buffer("running_mean", torch.zeros(3))
    with pytest.raises(CheckpointError, match="running_mean"):
        save_model(model, tmp_path, weights=False)


def test_an_adapter_config_that_is_no_json_is_named_without_weights(tmp_path: Path) -> None:
    model = add_lora(new_model(TINY, vocab_size=30), LoraSettings(rank=2))
    model.peft_config["default"].revision = object()  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="adapter default cannot be saved"):
        save_model(model, tmp_path, weights=False)
