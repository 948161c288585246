"""A stand-in for the compiled FlexAttention, which has no kernel for tensors of a pretended GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alignlab.models.flex_attention import flex_packed_attention
from alignlab.types import Segments


def dense_flex(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool
) -> Tensor:
    """Return what FlexAttention returns, by a dense mask made from the block mask's rule. Without soft-caps."""
    assert score_mod is None
    queries, keys = (torch.arange(x.shape[2], device=query.device) for x in (query, key))
    zero = torch.zeros((), dtype=torch.long, device=query.device)
    mask = block_mask.mask_mod(zero, zero, queries[:, None], keys[None, :])
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


def as_on_a_gpu(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments,
    *, scaling: float, sliding_window: int | None = None, softcap: float | None = None,
) -> Tensor:
    """Return `packed_attention` on the CPU by the operations that it has on a pretended GPU."""
    return flex_packed_attention(
        query, key, value, segments,
        scaling=scaling, sliding_window=sliding_window, softcap=softcap, flex=dense_flex,
    )
