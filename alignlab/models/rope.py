"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with the scalings of Llama 3 and YaRN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alignlab.models.config import PolicyConfig

Rotation = tuple[Tensor, Tensor]


def rope_frequencies(config: PolicyConfig) -> tuple[Tensor, float]:
    """Return inverse frequencies [head_dim / 2], float32, and the factor on cosine and sine (1 except for YaRN)."""
    assert config.rope_parameters is not None and config.head_dim is not None
    if config.rope_parameters["rope_type"] != "default":
        return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config, torch.device("cpu"))
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0


class RotaryEmbedding(nn.Module):
    """Cosines and signed sines of the positions, once for all layers."""

    inv_freq: Tensor

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        inv_freq, self.attention_scaling = rope_frequencies(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Move with the model, but stay float32: rounding to bfloat16 would change the frequencies."""
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = rope_frequencies(self.config)[0].to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Rotation:
        """Return (cosine, sine) [B, N, 1, D]; the sine's first half is negated, so that `rotate` needs no negation."""
        angles = (position_ids[..., None].float() * self.inv_freq).unsqueeze(-2)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Return heads [B, N, H, D] rotated by their positions: with halves (a, b), (a cos - b sin, b cos + a sin)."""
    cos, signed_sin = rotation
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), signed_sin)
