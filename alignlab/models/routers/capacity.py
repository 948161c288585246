"""Capacity: an expert takes so many tokens of a pass alone, and the choices beyond it are dropped.

A dropped choice adds nothing to its token, whose state goes on by the residual. Which are dropped depends on all tokens
of the pass, so an engine's drops are recorded, and replayed in training.

References: Lepikhin et al. (2020), GShard, arXiv:2006.16668, Alg. 1; Fedus et al. (2021), Switch Transformers,
arXiv:2101.03961, Eq. 3; by score: Riquelme et al. (2021), arXiv:2106.05974, Sec. 4.

Shapes: N tokens, E experts, K experts a token.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def expert_capacity(num_tokens: int, *, num_chosen: int, num_experts: int, factor: float) -> int:
    """Return the tokens that an expert takes: factor * N * K / E, rounded up, from 1 to N."""
    return max(1, min(num_tokens, math.ceil(factor * num_tokens * num_chosen / num_experts)))


def within_capacity(experts: Tensor, scores: Tensor, *, num_experts: int, capacity: int, by_score: bool) -> Tensor:
    """Return which choices have room at their expert, [N, K] bool.

    The first choices of all tokens come before the second ones, and so on. Among those of one rank, the earlier token
    comes first, or the one with the higher score.

    Args:
        experts: [N, K], best first, distinct.
        scores: [N, K] of them.
        num_experts: E.
        capacity: tokens that one expert takes.
        by_score: whether a higher score comes first, and the earlier token where scores are equal.
    """
    queue = torch.arange(len(experts), device=experts.device)[:, None].expand_as(experts)
    if by_score:
        queue = scores.argsort(dim=0, descending=True, stable=True)
    in_queue = experts.gather(0, queue).t().flatten()
    by_expert, order = in_queue.sort(stable=True)
    first = torch.searchsorted(by_expert, torch.arange(num_experts, device=experts.device))
    place = torch.arange(len(order), device=experts.device) - first[by_expert]
    has_room = torch.zeros_like(in_queue, dtype=torch.bool).scatter(0, order, place < capacity)
    return torch.zeros_like(experts, dtype=torch.bool).scatter(0, queue, has_room.unflatten(0, (-1, len(experts))).t())
