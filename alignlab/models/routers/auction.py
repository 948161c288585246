"""The balanced assignment of tokens to experts with the highest total score, by auction.

Bertsekas (1992), "Auction algorithms for network flow problems: a tutorial introduction"; for experts: Lewis et al.
(2021), BASE layers, arXiv:2103.16716, Sec. 2.

Shapes: N tokens, E experts, C = N / E tokens an expert, rounded up.
"""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_PRECISION = 1e-3
"""Smallest raise of a bid, in units of the range of the scores: how far a token may stay below its best offer."""


@torch.library.custom_op("alignlab::balanced_assignment", mutates_args=())
def balanced_assignment(scores: Tensor) -> Tensor:
    """Return the expert of each token, [N] int64 on the scores' device: at most C tokens an expert.

    The total score is within E * C * `RELATIVE_PRECISION` * (range of the scores) of the best one. The auction runs on
    the host, in float64, so that every device assigns alike. A score that is not finite counts as the lowest.

    Args:
        scores: [N, E] float.
    """
    values = scores.detach().double().cpu()
    finite = values.isfinite()
    lowest = values[finite].min() if bool(finite.any()) else values.new_zeros(())
    values = torch.where(finite, values, lowest) - lowest
    num_tokens, num_experts = values.shape
    capacity = -(-num_tokens // num_experts)
    # Tokens that are worth nothing to any expert fill up the room, so that every place is sold.
    padded = torch.cat([values, values.new_zeros(num_experts * capacity - num_tokens, num_experts)])
    return _auction(padded, capacity)[:num_tokens].to(scores.device)


@balanced_assignment.register_fake
def _(scores: Tensor) -> Tensor:
    return scores.new_empty(scores.shape[0], dtype=torch.int64)


def _auction(values: Tensor, capacity: int) -> Tensor:
    """Return the expert of each of E * C tokens; tokens without a place bid until every token has one."""
    num_tokens, num_experts = values.shape
    raise_by = max(RELATIVE_PRECISION * float(values.max()), 1e-9) if num_tokens else 1.0
    prices = values.new_zeros(num_experts)
    owners = torch.full((num_tokens,), num_experts)  # of a token: its expert; num_experts is none
    bids = values.new_zeros(num_tokens)
    while (free := (owners == num_experts).nonzero()[:, 0]).numel():
        offers, best = (values[free] - prices).topk(min(2, num_experts), dim=-1)
        owners[free] = best[:, 0]
        bids[free] = prices[best[:, 0]] + offers[:, 0] - offers[:, -1] + raise_by
        order = bids.argsort(descending=True, stable=True)
        order = order[owners[order].argsort(stable=True)]  # by expert, the highest bid first
        by_expert = owners[order]
        starts = torch.searchsorted(by_expert, torch.arange(num_experts + 1))
        places = torch.arange(num_tokens) - starts[by_expert]
        owners[order[places >= capacity]] = num_experts
        is_last = places == capacity - 1
        prices[by_expert[is_last]] = bids[order[is_last]]  # a full expert costs what its cheapest place was sold for
    return owners
