"""Dropout of the residual stream: where it acts in a layer, and with which random numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Phi3Config

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import hidden_states
from alignlab.models.dropout import switch_off_dropout
from alignlab.models.hub.checkpoints import load_model, save_model
from alignlab.models.hub.families import read_hub_config, write_hub_config
from alignlab.models.transformer import PolicyForCausalLM
from tests.models.attention_kinds import make_model
from tests.models.conftest import make_segments
from tests.models.test_parity import SIZES

BLOCKS: dict[str, dict[str, Any]] = {
    "pre": {"norm_position": "pre"}, "post": {"norm_position": "post"}, "sandwich": {"norm_position": "sandwich"},
    "parallel": {"parallel_attn": True},
}  # fmt: skip


@pytest.mark.parametrize("block", BLOCKS)
def test_what_is_added_to_the_stream_is_dropped_and_nothing_else(block: str) -> None:
    """A slow twin, with the same random numbers: both outputs, behind their norms, and not the stream itself."""
    model: Any = make_model("no-positions", **BLOCKS[block], residual_dropout=0.25).train()
    layer = model.model.layers[1]
    x, mask = torch.randn(1, 7, 32), torch.full((7, 7), -torch.inf).triu(1)[None, None]
    model.set_attn_implementation("eager")
    norm = {name: getattr(layer, place) if place else (lambda y: y) for name, place in layer.norms._asdict().items()}

    def attend(y: Tensor) -> Tensor:
        return layer.self_attn(norm["before_attention"](y), None, attention_mask=mask)[0]

    torch.manual_seed(3)
    outputs = layer(x, rotations={}, attention_mask=mask)
    torch.manual_seed(3)
    middle = x + F.dropout(norm["after_attention"](attend(x)), 0.25)
    read = norm["before_attention"](x) if block == "parallel" else norm["before_feed_forward"](middle)
    expected = middle + F.dropout(norm["after_feed_forward"](layer.mlp(read)), 0.25)
    torch.testing.assert_close(outputs, expected)
    layer.eval()
    assert torch.equal(layer(x, rotations={}, attention_mask=mask), layer(x, rotations={}, attention_mask=mask))


def test_packs_are_dropped_from_in_training_alone() -> None:
    model = make_model("no-positions", residual_dropout=0.5)
    segments = make_segments([(5, [3, 1, 6]), (7, [])])
    tokens = torch.randint(0, 50, (segments.num_tokens,))

    def states() -> Tensor:
        return hidden_states(model, tokens, segments.position_ids, segments).detach()

    whole = states()
    assert torch.equal(whole, states())
    model.train()
    assert (states() - whole).abs().max() > 0.1 and not torch.equal(states(), states())
    assert switch_off_dropout(model, keeps_residual=True) == {}
    assert switch_off_dropout(model) == {"residual_dropout": 0.5}
    torch.testing.assert_close(states(), whole)


def test_activation_checkpointing_draws_the_same_numbers_again() -> None:
    gradients = []
    for checkpoints in (False, True):
        model = make_model("sinks", residual_dropout=0.3).train()
        if checkpoints:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        segments = make_segments([(5, [3, 6])])
        torch.manual_seed(4)
        hidden_states(model, torch.arange(14), segments.position_ids, segments).sin().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_a_rate_that_is_none_is_refused(rate: float) -> None:
    with pytest.raises(ConfigError, match=f"residual_dropout is {rate}, and must be in \\[0, 1\\); use 0"):
        PolicyConfig(residual_dropout=rate)


def test_phi_3_drops_alike_and_is_written_back(tmp_path: Path) -> None:
    hub = Phi3Config(**SIZES, resid_pdrop=0.3)
    theirs = AutoModelForCausalLM.from_config(hub, attn_implementation="eager").train()
    theirs.save_pretrained(tmp_path / "theirs")
    ours: Any = load_model(str(tmp_path / "theirs"), dtype=torch.float32).train()
    assert type(ours) is PolicyForCausalLM and ours.config.residual_dropout == 0.3
    tokens, logits = torch.arange(3, 21).view(2, 9), []
    for model in (ours, theirs):
        torch.manual_seed(5)
        logits.append(model(tokens).logits)
    torch.testing.assert_close(*logits)
    save_model(ours, tmp_path / "ours")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "ours").config.resid_pdrop == 0.3
    bare = write_hub_config(read_hub_config(hub))
    assert isinstance(bare, Phi3Config) and bare.resid_pdrop == 0.3
