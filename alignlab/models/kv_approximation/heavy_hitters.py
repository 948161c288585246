"""The choice of the tokens that a cache with a budget keeps: those that the newest queries attend to most.

At a boundary b the `observed` queries before it give each token j that is still there

    s(j) = sum over these queries i, and over the G heads i' that share a kv head, of softmax(q_i' k_j)

and, with accumulation, s(j) of the boundary before it is added (H2O, with every query counted once where `observed` is
the interval; SnapKV without it). Of the tokens that are neither first nor recent, those with the largest s stay. The
keys of each kv head are chosen for themselves, and as many in each.

References: Zhang et al. (2023), arXiv:2306.14048, Section 4 (H2O); Li et al. (2024), arXiv:2404.14469, Section 4.

Shapes: K kv heads, G heads that share one, m observed queries, n tokens still there, D size of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from alignlab.models.sink_window import KeptTokens


class ScoreOptions(NamedTuple):
    """The options by which a layer turns products into weights; see `packed_attention`."""

    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None


def attention_received(
    query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor, options: ScoreOptions
) -> Tensor:
    """Return the attention [K,n] that keys receive from queries, at least in float32.

    Args:
        query: [m,K*G,D], positions applied.
        key: [K,n,D], likewise.
        query_positions, key_positions: [m] and [K,n]; a query sees the keys up to its own position.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    num_kv, count = len(key), len(query)
    folded = query.to(exact).view(count, num_kv, -1, query.shape[-1]).permute(1, 2, 0, 3)  # [K,G,m,D]
    scores = folded @ key.to(exact).transpose(-1, -2)[:, None] * options.scaling  # [K,G,m,n]
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    hidden = key_positions[:, None, :] > query_positions[None, :, None]
    scores = scores.masked_fill_(hidden[:, None], -torch.inf)
    if options.sinks is not None:
        joined = options.sinks.to(exact).view(num_kv, -1, 1, 1).expand(-1, -1, count, 1)
        scores = torch.cat((scores, joined), dim=-1)
    return scores.softmax(-1)[..., : key.shape[1]].sum((1, 2))


def kept_places(received: Tensor, kept: KeptTokens) -> Tensor:
    """Return the places [K, budget], rising, of the tokens that stay of n tokens in order, n >= budget.

    Args:
        received: [K,n], s(j).
    """
    num_kv, count = received.shape
    chosen = received[:, kept.sinks : count - kept.recent].topk(kept.heavy, dim=1).indices + kept.sinks
    first = torch.arange(kept.sinks, device=received.device)
    last = torch.arange(count - kept.recent, count, device=received.device)
    ends = torch.cat((first, last)).expand(num_kv, -1)
    return torch.cat((ends, chosen), dim=1).sort(dim=1).values


def dropped_places(kept: Tensor, count: int) -> Tensor:
    """Return the other places [K, count - budget], rising, of those that `kept_places` leaves of `count`."""
    is_kept = torch.zeros(len(kept), count, dtype=torch.int8, device=kept.device).scatter_(1, kept, 1)
    return is_kept.argsort(dim=1, stable=True)[:, : count - kept.shape[1]]
