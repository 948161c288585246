"""Quantized checkpoints: what is in the file, computed by hand; and `transformers` loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from alignlab.errors import ConfigError
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.hub.quantized_export import Scheme, check_quantizable, write_quantized

pytest.importorskip("compressed_tensors")
SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 16,
    "initializer_range": 0.3,
}  # fmt: skip
TOKENS = torch.arange(3, 21)[None]
NAME = "model.layers.1.mlp.up_proj"


def random_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    return new_model(SHAPE | changes, vocab_size=32).eval()


def logprobs(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits.float().log_softmax(-1)


def read_weight(stored: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Return a layer's rounded weights [O, groups, I / groups] and its scales [O, groups]."""
    scale = stored[f"{name}.weight_scale"].float()
    packed = stored.get(f"{name}.weight_packed")
    numbers = stored[f"{name}.weight"].float() if packed is None else unpacked(packed)
    return numbers.view(len(scale), scale.shape[1], -1) * scale[..., None], scale


def unpacked(packed: Tensor) -> Tensor:
    """Eight numbers of 4 bits lie in each int32, the first one lowest, each with 8 added."""
    shifts = torch.arange(0, 32, 4)
    return ((packed[:, :, None] >> shifts) & 15).flatten(1) - 8


@pytest.mark.parametrize(("scheme", "levels"), [("int8", 127.5), ("int4", 7.5), ("fp8", 448)])
def test_weights_are_the_nearest_of_their_scale(scheme: Scheme, levels: float, tmp_path: Path) -> None:
    model = check_quantizable(random_model(), scheme, 16)
    error = write_quantized(model, tmp_path, scheme, 16)
    stored = load_file(tmp_path / "model.safetensors")
    weight = model.get_submodule(NAME).weight.detach()
    rounded, scale = read_weight(stored, NAME)
    groups = weight.view_as(rounded)
    torch.testing.assert_close(scale, groups.abs().amax(-1) / levels, rtol=1e-5, atol=0)
    assert scale.shape == ((64, 2) if scheme == "int4" else (64, 1))
    if scheme != "fp8":  # evenly spaced; the largest of one sign may be a whole step away, as there is one level less
        assert ((groups - rounded).abs() <= scale[..., None] * 0.501).float().mean() > 0.97
        assert ((groups - rounded).abs() <= scale[..., None] * 1.001).all()
    else:  # three bits behind the point
        assert ((groups - rounded).abs() <= groups.abs() / 16 + scale[..., None] * 2**-9).all()
    assert 0 < error < 0.1


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_transformers_computes_with_the_rounded_weights(scheme: Scheme, tmp_path: Path) -> None:
    model = random_model()
    write_quantized(model, tmp_path, scheme, 16)
    hub: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert hub.config.quantization_config.quant_method == "compressed-tensors"
    stored = load_file(tmp_path / "model.safetensors")
    before = logprobs(model)
    for name, module in model.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            rounded, _ = read_weight(stored, f"model.{name}")
            module.weight.data.copy_(rounded.view_as(module.weight))
    gap = (logprobs(hub) - logprobs(model)).abs()
    if scheme == "int4":
        assert gap.max() < 1e-4 < (before - logprobs(model)).abs().max()
    else:  # activations are rounded too
        assert 1e-4 < gap.mean() < 0.3


def test_what_cannot_be_quantized_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--group-size is 24, and must divide .*q_proj has 32; use 32 or 64"):
        check_quantizable(random_model(), "int4", 24)
    with pytest.raises(ConfigError, match="the model has experts"):
        check_quantizable(random_model(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8), "int8", 16)
    with pytest.raises(ConfigError, match="is of none here"):
        check_quantizable(random_model(attn_logit_softcapping=5.0, attention_sinks=True), "int8", 16)
