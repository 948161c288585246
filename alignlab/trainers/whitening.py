"""Advantages of tokens to mean 0 and variance 1 over a whole step: all its mini-batches, packs and ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignlab.functional.values import mean_and_variance, moments, whitened
from alignlab.types import Experience


def whiten(
    minibatches: Sequence[Sequence[Experience]], reduce_sum: Callable[[Tensor], Tensor]
) -> list[list[Experience]]:
    """The packs with the advantages of their trained tokens whitened; every rank must call this together.

    Args:
        minibatches: this rank's packs, with advantages.
        reduce_sum: adds a tensor over ranks.
    """
    totals = torch.zeros(3, dtype=torch.float64)
    for pack in (pack for packs in minibatches for pack in packs):
        assert pack.advantages is not None
        totals = totals + moments(pack.advantages, pack.completion_mask).cpu()
    mean, variance = mean_and_variance(reduce_sum(totals))
    return [[_whitened(pack, mean, variance) for pack in packs] for packs in minibatches]


def _whitened(pack: Experience, mean: float, variance: float) -> Experience:
    assert pack.advantages is not None
    advantages = whitened(pack.advantages, pack.completion_mask, mean=mean, variance=variance)
    return replace(pack, advantages=advantages)
