"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with the scalings of Llama 3, YaRN and LongRoPE.

LongRoPE (Ding et al. 2024, arXiv:2402.13753) has two lists of factors: for sequences of up to
`original_max_position_embeddings` tokens, and for longer ones. Here the short ones hold, and a model takes no longer
sequences: `transformers` takes the list by the longest sequence of a batch, so that a token's log-prob would depend on
its neighbours, and keys in a cache would have other rotations than those that follow.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from alignlab.models.config import PolicyConfig

Rotation = tuple[Tensor, Tensor]


def rope_frequencies(config: PolicyConfig, size: int, *, local: bool = False) -> tuple[Tensor, float]:
    """Return inverse frequencies [size / 2], float32, and the factor on cosine and sine (1 but for YaRN and LongRoPE).

    Args:
        size: numbers of a head that are rotated.
        local: of layers with a window, where they have a base of their own.
    """
    assert config.rope_parameters is not None
    if local:
        assert config.rope_local_base_freq is not None
        return _default_frequencies(config.rope_local_base_freq, size), 1.0
    if config.rope_parameters["rope_type"] != "default":
        sized = copy.copy(config)  # `transformers` reads the size from a config
        sized.head_dim = size
        sized.rope_parameters = {k: v for k, v in config.rope_parameters.items() if k != "partial_rotary_factor"}
        with torch.device("cpu"):  # also where a model without weights is made
            return ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](sized, torch.device("cpu"))
    return _default_frequencies(config.rope_parameters["rope_theta"], size), 1.0


def _default_frequencies(base: float, size: int) -> Tensor:
    """Return base ** (-2 i / size) for i from 0 to size / 2 - 1, float32."""
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    return 1.0 / (base**exponents)


def latent_scale(config: PolicyConfig) -> float:
    """Return the factor on the scores of rotated latent attention under YaRN: (0.1 mscale_all_dim ln(factor) + 1)^2."""
    rope = config.rope_parameters or {}
    strength, factor = rope.get("mscale_all_dim", 0), rope.get("factor", 1.0)
    return (0.1 * strength * math.log(factor) + 1.0) ** 2 if strength and factor > 1 else 1.0


class RotaryEmbedding(nn.Module):
    """Cosines and signed sines of the positions, once for all layers that rotate alike.

    Args:
        size: numbers of a head that are rotated.
        local: see `rope_frequencies`.
    """

    inv_freq: Tensor

    def __init__(self, config: PolicyConfig, size: int, *, local: bool = False) -> None:
        super().__init__()
        self.config = config
        self.size = size
        self.local = local
        inv_freq, self.attention_scaling = rope_frequencies(config, size, local=local)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def frequencies(self) -> Tensor:
        """Return the inverse frequencies [size / 2] that the config gives, float32."""
        return rope_frequencies(self.config, self.size, local=self.local)[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotaryEmbedding:
        """Move with the model, but stay float32: rounding to bfloat16 would change the frequencies."""
        super()._apply(fn, recurse)
        if self.inv_freq.dtype != torch.float32:
            self.inv_freq = self.frequencies().to(self.inv_freq.device)
        return self

    @torch.no_grad()
    def forward(self, position_ids: Tensor, dtype: torch.dtype) -> Rotation:
        """Return (cosine, sine) [B, N, 1, size]; the sine's first half is negated, so that `rotate` needs no negation.
        """
        angles = (position_ids[..., None].float() * self.inv_freq).unsqueeze(-2)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(heads: Tensor, rotation: Rotation, rest: int = 0) -> Tensor:
    """Return heads [B, N, H, D] rotated by their positions: with halves (a, b), (a cos - b sin, b cos + a sin).

    Args:
        rest: so many of a head's last numbers stay as they are. Told, and not found by a comparison of shapes, in which
            vLLM's tracing of the attention would end.
    """
    cos, signed_sin = rotation
    if rest:
        first, last = heads.split([heads.shape[-1] - rest, rest], dim=-1)
        return torch.cat((rotate(first, rotation), last), dim=-1)
    return torch.addcmul(heads * cos, heads.roll(heads.shape[-1] // 2, dims=-1), signed_sin)


def deinterleaved(heads: Tensor) -> Tensor:
    """Return heads [..., D] with the first numbers of all pairs of neighbours before the second ones, as `rotate` has
    its pairs."""
    return heads.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
