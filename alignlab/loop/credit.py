"""Advantages of completions and tokens, on packs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from alignlab.functional.reduction import mean_and_variance, moments, sequence_sum
from alignlab.functional.values import whitened
from alignlab.types import Experience


def trained_part(pack: Experience, trainable: Tensor) -> Experience:
    """Return the pack with the tokens of sequences that are not trainable [B] masked out."""
    sequences = pack.segments.sequence_of_token.clamp(min=0)
    return replace(pack, completion_mask=pack.completion_mask & trainable[sequences])


def spread(pack: Experience, advantages: Tensor, trainable: Tensor) -> Experience:
    """Return the pack with each sequence's advantage [B] on its tokens, of the sequences [B] that are trainable."""
    masked = trained_part(pack, trainable)
    sequences = pack.segments.sequence_of_token.clamp(min=0)
    return replace(masked, advantages=torch.where(masked.completion_mask, advantages[sequences], 0.0))


def sequence_means(packs: Sequence[Experience], num_sequences: int) -> Tensor:
    """Return the mean advantage [B] of each sequence's trained tokens; 0 where it has none."""
    device = packs[0].tokens.device if packs else torch.device("cpu")
    totals = torch.zeros(2, num_sequences, device=device)
    for pack in packs:
        assert pack.advantages is not None
        ids = pack.segments.sequence_of_token
        for total, values in zip(totals, (pack.advantages, pack.completion_mask.float()), strict=True):
            total += sequence_sum(values, ids, num_sequences=num_sequences)
    return totals[0] / totals[1].clamp(min=1)


def whiten(
    minibatches: Sequence[Sequence[Experience]], reduce_sum: Callable[[Tensor], Tensor]
) -> list[list[Experience]]:
    """Return the packs with their trained tokens' advantages at mean 0 and variance 1 over the whole step.

    The step is all mini-batches, packs and ranks; every rank calls this together.

    Args:
        minibatches: this rank's packs, with advantages.
        reduce_sum: adds a tensor over ranks.
    """
    on_this_rank = [_moments(pack) for packs in minibatches for pack in packs]
    totals = torch.stack(on_this_rank).sum(dim=0) if on_this_rank else torch.zeros(3, dtype=torch.float64)
    mean, variance = mean_and_variance(reduce_sum(totals))
    return [[_whitened(pack, mean, variance) for pack in packs] for packs in minibatches]


def _moments(pack: Experience) -> Tensor:
    assert pack.advantages is not None
    return moments(pack.advantages, pack.completion_mask)


def _whitened(pack: Experience, mean: float, variance: float) -> Experience:
    assert pack.advantages is not None
    advantages = whitened(pack.advantages, pack.completion_mask, mean=mean, variance=variance)
    return replace(pack, advantages=advantages)
