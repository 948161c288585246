"""The record of which tokens a cache with a budget has dropped, and when.

A record is [N, L, bytes] uint8 for L layers. Of a layer, byte 0 is 1 if the token has a record there; then, for each kv
head, there are 4 bytes of a whole number. Of a token of the prompt it is 1 if the end of the prompt dropped it. Of a
token of the completion it is 1 + the position of one that the next boundary dropped, or 0: a boundary drops at most as
many tokens as came since the one before it.

Shapes: K kv heads, P tokens of a prompt, C of a completion.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from alignlab.models.sink_window import KeptTokens

_BYTES = 4
NEVER = 2**31 - 1
"""The boundary that drops tokens which stay."""

Evictions = dict[int, dict[int, Tensor]]
"""By boundary and layer, the places [K, budget], rising, of the tokens that stayed of those that were there."""


def record_of_evictions(
    evictions: Evictions, kept: KeptTokens, heads: Mapping[int, int], num_tokens: int, num_prompt: int
) -> Tensor:
    """Return the record [num_tokens, L, bytes] of a sequence, on the CPU.

    Args:
        heads: kv heads of the layers that drop tokens.
        num_tokens: that were computed.
        num_prompt: of the prompt.
    """
    record = torch.zeros(num_tokens, 1 + max(heads), 1 + _BYTES * max(heads.values()), dtype=torch.uint8)
    for layer_idx, num_heads in heads.items():
        numbers = torch.zeros(num_tokens, num_heads, dtype=torch.int32)
        positions, end = torch.empty(num_heads, 0, dtype=torch.int64), 0
        for boundary in sorted(evictions):
            new = torch.arange(end, boundary).expand(num_heads, -1)
            positions, end = torch.cat((positions, new), dim=1), boundary
            places = evictions[boundary][layer_idx].cpu()
            is_dropped = torch.ones(positions.shape, dtype=torch.bool).scatter_(1, places, False)
            dropped = positions[is_dropped].view(num_heads, -1)
            if boundary == num_prompt:
                numbers.scatter_(0, dropped.T, 1)
            elif dropped.shape[1]:
                assert kept.interval is not None
                first = boundary - kept.interval
                numbers[first : first + dropped.shape[1]] = dropped.T.to(torch.int32) + 1
            positions = positions.gather(1, places)
        record[:, layer_idx, 0] = 1
        record[:, layer_idx, 1 : 1 + _BYTES * num_heads] = numbers.view(torch.uint8)
    return record


def recorded_drops(of_prompt: Tensor, of_completion: Tensor, num_heads: int, kept: KeptTokens) -> Tensor:
    """Return the boundary [K, P + C] that drops each token of a sequence, `NEVER` for those that stay.

    Args:
        of_prompt, of_completion: [P, bytes] and [C, bytes], records of a layer.
        num_heads: K.
    """
    num_prompt, count, device = len(of_prompt), len(of_completion), of_prompt.device
    end = num_prompt + count
    drops = torch.full((num_heads, end + 1), NEVER, dtype=torch.int64, device=device)  # the last: of no token
    drops[:, :num_prompt].masked_fill_(_numbers(of_prompt, num_heads).T == 1, num_prompt)
    if kept.interval is not None:
        dropped = _numbers(of_completion, num_heads).long().T
        intervals = torch.arange(count, device=device) // kept.interval + 1
        boundaries = (num_prompt + intervals * kept.interval).expand(num_heads, -1)
        drops.scatter_(1, torch.where(dropped > 0, dropped - 1, end), boundaries)
    return drops[:, :end]


def _numbers(record: Tensor, num_heads: int) -> Tensor:
    """Return the whole numbers [tokens, K] of a layer's record [tokens, bytes]."""
    # A copy, since one row counts as contiguous wherever it begins, and whole numbers begin at a multiple of 4.
    return record[:, 1 : 1 + _BYTES * num_heads].clone(memory_format=torch.contiguous_format).view(torch.int32)
