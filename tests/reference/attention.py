"""The slow, obvious twin of packed attention: one dense mask, float64."""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.types import Segments


def visible(segments: Segments, window: int | None = None) -> Tensor:
    """[N, N] whether a token (row) sees another (column), by one look at each pair."""
    count = segments.num_tokens
    own = segments.segment_of_token.tolist()
    positions = segments.position_ids.tolist()
    mask = torch.zeros(count, count, dtype=torch.bool)
    for q in range(count):
        for k in range(count):
            mask[q, k] = (own[q] == own[k] and k <= q) or segments.prefixes[own[q]] == own[k]
            if window is not None and positions[q] - positions[k] >= window:
                mask[q, k] = False
    return mask


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments,
    *, scaling: float, sliding_window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """[1,H,N,D], [1,K,N,D], [1,K,N,V], sinks [H] -> [1,N,H,V] in float64. A sink is one more key, whose value is 0."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(segments, sliding_window), -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
        value = torch.nn.functional.pad(value, (0, 0, 0, 1))
    return (scores.softmax(-1) @ value).transpose(1, 2)
