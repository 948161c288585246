"""LongRoPE of Phi-3 and Phi-4: the factors of short sequences by hand, and sequences that are too long for them."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

from alignlab.config.rollout import RolloutSettings
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import num_positions
from alignlab.models.hub.checkpoints import load_model, save_model
from alignlab.models.hub.families import read_hub_config
from alignlab.models.rope import rope_frequencies
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import Prompt, SamplingParams
from tests.models.test_parity import HUB, LONG_ROPE, SIZES

ROPE: dict[str, Any] = {**LONG_ROPE, "original_max_position_embeddings": 64, "factor": 8.0}


def test_frequencies_and_scale_by_hand() -> None:
    config = PolicyConfig(rope_parameters=ROPE, max_position_embeddings=64, hidden_size=32, num_attention_heads=4)
    frequencies, scale = rope_frequencies(config, 6)
    expected = [1.0 / (factor * 1e4 ** (2 * i / 6)) for i, factor in enumerate((1.0, 1.5, 2.0))]
    torch.testing.assert_close(frequencies, torch.tensor(expected))
    assert scale == pytest.approx(math.sqrt(1 + math.log(8) / math.log(64)))


def test_a_checkpoint_keeps_its_long_factors_and_takes_short_sequences(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(HUB["phi3-longrope"](), attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "theirs")
    with caplog.at_level(logging.WARNING, logger="alignlab.models.hub.checkpoints"):
        ours = load_model(str(tmp_path / "theirs"), dtype=torch.float32)
    assert "takes sequences of up to 64 tokens here" in caplog.text and num_positions(ours) == 64
    short, long = (torch.randint(3, 61, (1, length)) for length in (64, 65))
    with torch.no_grad():
        torch.testing.assert_close(ours(short).logits, theirs(short).logits, rtol=1e-4, atol=1e-4)
        gap = (theirs(long).logits[:, :64] - theirs(long[:, :64]).logits).abs().max()
    assert gap > 1e-2, "a token more changes all others in transformers, and so no such sequence is taken"
    with pytest.raises(RolloutError, match="max_position_embeddings"):
        engine = EmbeddedEngine(ours, train_tokenizer(["ab"], vocab_size=259), RolloutSettings())
        engine.generate([Prompt(tuple(long[0].tolist()), "", 0, {})], SamplingParams(max_new_tokens=1))
    save_model(ours, tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert (written["max_position_embeddings"], written["original_max_position_embeddings"]) == (512, 64)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(long).logits, theirs(long).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["short_factor", "factor"])
def test_what_is_missing_is_named(name: str) -> None:
    rope = {key: value for key, value in ROPE.items() if key != name}
    with pytest.raises((ConfigError, KeyError), match=name):
        PolicyConfig(rope_parameters=rope, max_position_embeddings=64, hidden_size=32, num_attention_heads=4)


def test_a_model_of_short_sequences_needs_no_factor_of_its_own() -> None:
    config = Phi3Config(
        **SIZES, max_position_embeddings=32, original_max_position_embeddings=64, rope_parameters=LONG_ROPE
    )
    ours = read_hub_config(config)
    assert ours is not None and ours.max_position_embeddings == 32 and ours.rope_parameters["factor"] == 0.5
