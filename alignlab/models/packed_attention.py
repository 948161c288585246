"""Attention over packed sequences, some of which share a prompt."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alignlab.types import Segments


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments,
    *, scaling: float, sliding_window: int | None = None, softcap: float | None = None,
) -> Tensor:
    """[1,H,N,D], [1,K,N,D], [1,K,N,D] -> [1,N,H,D]."""
    assert sliding_window is None and softcap is None
    own = segments.segment_of_token
    prefix = torch.tensor(segments.prefixes, device=own.device)[own]
    index = torch.arange(segments.num_tokens, device=own.device)
    mask = (own[:, None] == own[None, :]) & (index[:, None] >= index[None, :]) | (prefix[:, None] == own[None, :])
    return scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True
    ).transpose(1, 2)
