"""The weight of each token in an optimizer step's loss, fixed before the step is cut into micro-batches.

A pack's loss is `(token_loss * weights).sum()`, and the weights hold the denominators of the whole step: over all packs
and all ranks. The gradient is a plain sum, whatever the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.functional.reduction import constant_weights, sequence_mean_weights, sequence_sum, token_mean_weights
from alignlab.types import Experience


@dataclass(frozen=True)
class StepTotals:
    """Counts over every pack of an optimizer step.

    Attributes:
        num_tokens: trained tokens, over all ranks.
        num_sequences: sequences with at least one trained token, over all ranks.
        sequence_tokens: [B] trained tokens of each of this rank's sequences.
        is_empty: no token is trained, on any rank; the numbers are 1 then, so that means are 0.
    """

    num_tokens: int
    num_sequences: int
    sequence_tokens: Tensor
    is_empty: bool = False


def count_step(packs: Sequence[Experience], reduce_sum: Callable[[Tensor], Tensor]) -> StepTotals:
    """Count what a step trains on. `reduce_sum` adds a tensor over ranks; every rank must call this together."""
    num_local = 1 + max((max(pack.segments.sequence_ids) for pack in packs), default=-1)
    device = packs[0].tokens.device if packs else torch.device("cpu")
    counts = torch.zeros(num_local, device=device)
    for pack in packs:
        counts += sequence_sum(pack.completion_mask.float(), pack.segments.sequence_of_token, num_sequences=num_local)
    sequence_tokens = counts.long()
    totals = reduce_sum(torch.stack([sequence_tokens.sum(), (sequence_tokens > 0).sum()]))
    num_tokens, num_sequences = totals.tolist()
    return StepTotals(max(1, num_tokens), max(1, num_sequences), sequence_tokens, is_empty=num_tokens == 0)


Weigh = Callable[[Experience, StepTotals], Tensor]


def token_mean(pack: Experience, totals: StepTotals) -> Tensor:
    """Every trained token of the step weighs the same."""
    return token_mean_weights(pack.completion_mask, num_tokens=totals.num_tokens)


def sequence_mean(pack: Experience, totals: StepTotals) -> Tensor:
    """Every sequence of the step weighs the same, its tokens share its weight."""
    return sequence_mean_weights(
        pack.completion_mask,
        pack.segments.sequence_of_token,
        totals.sequence_tokens,
        num_sequences=totals.num_sequences,
    )


def pair_mean(pack: Experience, totals: StepTotals) -> Tensor:
    """Every pair of completions weighs the same; what a pair comes to stands on one token of it."""
    return torch.full((pack.num_tokens,), 2 / totals.num_sequences, device=pack.tokens.device)


def constant(max_tokens: int) -> Weigh:
    """Every token weighs 1 / (sequences * completion limit), as in Dr. GRPO."""

    def weigh(pack: Experience, totals: StepTotals) -> Tensor:
        return constant_weights(pack.completion_mask, num_sequences=totals.num_sequences, max_tokens=max_tokens)

    return weigh


def sequence_means(packs: Sequence[Experience], num_sequences: int) -> Tensor:
    """Mean advantage [B] of each sequence's trained tokens; 0 where it has none."""
    device = packs[0].tokens.device if packs else torch.device("cpu")
    totals = torch.zeros(2, num_sequences, device=device)
    for pack in packs:
        assert pack.advantages is not None
        ids = pack.segments.sequence_of_token
        for total, values in zip(totals, (pack.advantages, pack.completion_mask.float()), strict=True):
            total += sequence_sum(values, ids, num_sequences=num_sequences)
    return totals[0] / totals[1].clamp(min=1)
