"""Floors under the probabilities of tokens: what top-k and top-p keep, all ties with the least likely token included.

Two ways find the same floors. Bisection reads the whole vocabulary 31 times, which on a CPU costs a tenth of a sort. A
GPU selects each row's likeliest tokens by one kernel and looks among those alone: a nucleus that reaches beyond them is
told by a flag, which the host reads together with the sampled tokens, and only then is bisected.

Shapes: B rows, V vocabulary, M likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

_UNITS = 2.0**52
"""Of a probability of 1, where probabilities are summed as whole numbers."""


def at_least(weights: Tensor, floor: Tensor) -> Tensor:
    """Return `weights` [B,V] with those under `floor` [B] set to 0."""
    return torch.ge(weights, floor[:, None], out=torch.empty_like(weights)).mul_(weights)


def floor_by_bisection(weights: Tensor, target: Tensor, *, count: bool) -> Tensor:
    """Return the highest floor [B] above which `weights` [B,V], or their number if `count`, sum to `target` [B].

    The bisection runs over the bit patterns of float32, which have the order of the (non-negative) numbers, and so is
    exact.
    """
    low = torch.zeros_like(target, dtype=torch.int32)
    high = weights.amax(-1).view(torch.int32) + 1
    above = torch.empty_like(weights)
    for _ in range(31):
        middle = low + (high - low) // 2
        torch.ge(weights, middle.view(torch.float32)[:, None], out=above)
        reached = (above if count else above.mul_(weights)).sum(-1) >= target
        low, high = torch.where(reached, middle, low), torch.where(reached, high, middle)
    return low.view(torch.float32)


def floors_among(
    probs: Tensor, num_likeliest: int, *, top_k: Tensor | None, top_p: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return the floor of top-k and, of the tokens that it leaves, top-p, looked for among each row's likeliest tokens.

    Args:
        probs: [B,V].
        num_likeliest: M, at least every row's top-k that is under V.
        top_k: [B] float32, V or more for rows without; None if no row has it.
        top_p: [B], 1 for rows without; None if no row has it.

    Returns:
        Floors [B]; and [B] bool, False for rows whose top-p reaches beyond the M likeliest tokens. None if all are
        right.
    """
    likeliest = probs.topk(num_likeliest, dim=-1).values  # [B,M], falling
    if top_k is None:
        has_top_k, floor = torch.zeros_like(probs[:, 0], dtype=torch.bool), torch.zeros_like(probs[:, 0])
    else:
        has_top_k = top_k <= num_likeliest
        last = top_k.clamp(max=num_likeliest).long() - 1
        floor = torch.where(has_top_k, likeliest.gather(1, last[:, None])[:, 0], 0.0)
    if top_p is None:
        return floor, None
    target = top_p * at_least(probs, floor).sum(-1)
    # Tokens that tie with the last of top-k may not be among the M, and are not needed: they have its floor. Sums of
    # whole numbers do not depend on their order, which CUDA leaves open for floats.
    mass = (at_least(likeliest, floor).double() * _UNITS).long().cumsum(-1)
    reaches = mass >= (target.double() * _UNITS).long()[:, None]
    is_reached = reaches[:, -1]
    first = reaches.int().argmax(-1, keepdim=True)
    nucleus = torch.where(is_reached, likeliest.gather(1, first)[:, 0], floor)
    is_exact = is_reached | has_top_k | (top_p >= 1)
    return torch.where(top_p < 1, torch.maximum(nucleus, floor), floor), is_exact
