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
        pack_tokens: trained tokens of each of this rank's packs.
    """

    num_tokens: int
    num_sequences: int
    sequence_tokens: Tensor
    is_empty: bool = False
    pack_tokens: tuple[int, ...] = ()


def count_step(packs: Sequence[Experience], reduce_sum: Callable[[Tensor], Tensor]) -> StepTotals:
    """Count what a step trains on; every rank calls this together.

    Args:
        reduce_sum: adds a tensor over ranks.
    """
    num_local = 1 + max((i for pack in packs for i in pack.segments.sequences), default=0)
    device = packs[0].tokens.device if packs else torch.device("cpu")
    counts = torch.zeros(num_local, device=device)
    for pack in packs:
        counts += sequence_sum(pack.completion_mask.float(), pack.segments.sequence_of_token, num_sequences=num_local)
    sequence_tokens = counts.long()
    totals = reduce_sum(torch.stack([sequence_tokens.sum(), (sequence_tokens > 0).sum()]))
    of_packs = [pack.completion_mask.sum() for pack in packs]
    num_tokens, num_sequences, *pack_tokens = torch.stack([*totals, *of_packs]).tolist()  # the host waits here alone
    return StepTotals(
        max(1, num_tokens), max(1, num_sequences), sequence_tokens, is_empty=num_tokens == 0,
        pack_tokens=tuple(pack_tokens),
    )


LossWeights = Callable[[Experience, StepTotals], Tensor]
"""(pack, totals of the step) -> weight of each loss of the pack: [N] tokens, [S] sequences or [P] pairs."""


def token_mean(pack: Experience, totals: StepTotals) -> Tensor:
    """Return equal weights [N] for all trained tokens of the step."""
    return token_mean_weights(pack.completion_mask, num_tokens=totals.num_tokens)


def sequence_mean(pack: Experience, totals: StepTotals) -> Tensor:
    """Return weights [N] with which every sequence counts the same, and so do its tokens."""
    return sequence_mean_weights(
        pack.completion_mask,
        pack.segments.sequence_of_token,
        totals.sequence_tokens,
        num_sequences=totals.num_sequences,
    )


def whole_sequence_mean(pack: Experience, totals: StepTotals) -> Tensor:
    """Return equal weights for losses [S] of whole sequences."""
    return torch.full((len(pack.segments.sequences),), 1 / totals.num_sequences, device=pack.tokens.device)


def pair_mean(pack: Experience, totals: StepTotals) -> Tensor:
    """Return equal weights for losses [P] of pairs of sequences."""
    return torch.full((len(pack.segments.pairs),), 2 / totals.num_sequences, device=pack.tokens.device)


def constant(max_tokens: int) -> LossWeights:
    """Return weights [N] of 1 / (sequences * completion limit) for each trained token, as in Dr. GRPO."""

    def weights(pack: Experience, totals: StepTotals) -> Tensor:
        return constant_weights(pack.completion_mask, num_sequences=totals.num_sequences, max_tokens=max_tokens)

    return weights
