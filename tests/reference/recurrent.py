"""The gated delta rule one token at a time, one segment after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.types import Segments


def recurrent_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor, segments: Segments,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs [N,H,V], and the state after each segment [S,H,K,V]; arguments as in `packed_delta_rule`."""
    outputs: list[Tensor] = []
    ends: list[Tensor] = []
    rows = zip(segments.starts, segments.lengths, segments.prefixes, strict=True)
    for index, (first, length, prefix) in enumerate(rows):
        if prefix >= 0:
            state = ends[prefix]
        else:
            state = query.new_zeros(*key.shape[1:], value.shape[2]) if start is None else start[index]
        for t in range(first, first + length):
            decay = log_decay[t].exp()
            state = state * (decay[:, :, None] if decay.dim() == 2 else decay[:, None, None])
            read = torch.einsum("hkv,hk->hv", state, key[t])
            written = strength[t][:, None] * (value[t] - read)
            state = state + key[t][:, :, None] * written[:, None, :]
            outputs.append(torch.einsum("hkv,hk->hv", state, query[t]))
        ends.append(state)
    return torch.stack(outputs), torch.stack(ends)
