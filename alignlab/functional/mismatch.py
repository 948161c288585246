"""Correcting for the gap between the engine that sampled and the trainer, at the same weights.

With mu the log-prob that the engine reported and old the trainer's own, each token was sampled from mu and is trained
as if from old. Its exact weight is a ratio of probabilities, whose variance each function below bounds in its own way.
A ratio r is of one of three levels, and a weight is made of r in one of three forms:

                                                   truncated         masked importance    mask alone
                                                   min(r, high)      r, or 0 outside      1, or 0 outside
    token      r = exp(old - mu)                   token_tis         icepop               token_mask
    sequence   r = exp(sum of (old - mu))          sequence_tis      sequence_mis         sequence_mask
    geometric  r = exp(mean of (old - mu))                           geometric_mis        geometric_mask

The sequence's ratio is the exact one of a whole completion, and grows with its length; the token's leaves out what
came before the token; the geometric mean is no importance weight, but a measure of distance that lengths do not move.
"Outside" is r < low or r > high. All functions return [N] weights without a gradient, for the policy-gradient loss of
each token; 1 where engine and trainer agree. A token of weight 0 still counts in the denominator of the step's loss.

Names elsewhere: TRL's token_truncate, token_mask, sequence_truncate, sequence_mask are token_tis, icepop, sequence_tis
and sequence_mis; verl's rollout_is token and sequence are the truncated forms, its rollout_rs token_k1, seq_sum_k1 and
seq_mean_k1 the masks alone, with bounds of the inverse ratio.
"""

from __future__ import annotations

from typing import TypedDict, Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignlab.functional.precision import at_least_float32, clamped_exp
from alignlab.functional.reduction import sequence_sum


class Sequences(TypedDict):
    """Which sequence each token belongs to, for the levels above the token.

    Attributes:
        mask: [N] bool, tokens that the policy sampled; all masked tokens of a sequence must be in this pack.
        sequence_ids: [N] int, which sequence each token belongs to; -1 on shared prompts.
        num_sequences: sequences of the step.
    """

    mask: Tensor
    sequence_ids: Tensor
    num_sequences: int


@torch.no_grad()
def token_tis(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, cap: float
) -> Float[Tensor, "N"]:
    """Truncated importance sampling: a token counts by its own ratio, at most `cap` times.

    Args:
        old_logprobs: under the trainer's weights before the update, nats.
        rollout_logprobs: as the engine reported, of the same weights, nats.
        cap: > 0; 2 is usual.

    Reference: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    return _truncated(_token_ratio(old_logprobs, rollout_logprobs), cap)


@torch.no_grad()
def icepop(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, low: float, high: float
) -> Float[Tensor, "N"]:
    """Masked importance sampling by token: a token counts by its ratio within the bounds, and not at all outside.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        low, high: 0 <= low < 1 < high; 0.5 and 5 are usual.

    Reference: Ling Team (2025), arXiv:2510.18855, Sec. 3 (IcePop).
    """
    return _masked(_token_ratio(old_logprobs, rollout_logprobs), low, high)


@torch.no_grad()
def token_mask(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, low: float, high: float
) -> Float[Tensor, "N"]:
    """Rejection by token: a token counts as it is while its ratio is within the bounds, and not at all outside.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        low, high: 0 <= low < 1 < high.

    Reference: Liu et al. (2025), "When Speed Kills Stability", rejection sampling, at the level of tokens.
    """
    return _mask_alone(_token_ratio(old_logprobs, rollout_logprobs), low, high)


@torch.no_grad()
def sequence_tis(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, cap: float,
    **sequences: Unpack[Sequences],
) -> Float[Tensor, "N"]:
    """Truncated importance sampling by sequence: each token counts by the ratio of its sequence's probabilities.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        cap: > 0; 2 to 10 is usual.
        sequences: see `Sequences`.

    Reference: Liu et al. (2025), "When Speed Kills Stability", sequence-level truncated importance sampling.
    """
    return _truncated(_sequence_ratio(old_logprobs, rollout_logprobs, **sequences), cap)


@torch.no_grad()
def sequence_mis(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, low: float, high: float,
    **sequences: Unpack[Sequences],
) -> Float[Tensor, "N"]:
    """Masked importance sampling by sequence: a sequence counts by its ratio within the bounds, and not at all outside.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        low, high: 0 <= low < 1 < high. The paper and TRL bound the ratio from above alone, which is low = 0.
        sequences: see `Sequences`.

    Reference: Liu et al. (2025), "When Speed Kills Stability", sequence-level masked importance sampling.
    """
    return _masked(_sequence_ratio(old_logprobs, rollout_logprobs, **sequences), low, high)


@torch.no_grad()
def sequence_mask(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, low: float, high: float,
    **sequences: Unpack[Sequences],
) -> Float[Tensor, "N"]:
    """Rejection by sequence: a sequence counts as it is while its ratio is within the bounds, and not at all outside.

    The sum grows with the length, so long completions are dropped first: watch what is kept, by length. TRL's
    `sequence_mask` also weighs what it keeps: that is `sequence_mis`.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        low, high: 0 <= low < 1 < high.
        sequences: see `Sequences`.

    Reference: Liu et al. (2025), "When Speed Kills Stability", sequence-level rejection sampling.
    """
    return _mask_alone(_sequence_ratio(old_logprobs, rollout_logprobs, **sequences), low, high)


@torch.no_grad()
def geometric_mis(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, low: float, high: float,
    **sequences: Unpack[Sequences],
) -> Float[Tensor, "N"]:
    """`sequence_mis` by the geometric mean of the tokens' ratios, which does not grow with the length.

    It is no importance weight: it is the sequence's ratio to the power 1 / length, of low variance and biased.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        low, high: see `geometric_mask`.
        sequences: see `Sequences`.

    Reference: Liu et al. (2025), "When Speed Kills Stability", geometric-level masked importance sampling (Geo-MIS).
    """
    return _masked(_geometric_ratio(old_logprobs, rollout_logprobs, **sequences), low, high)


@torch.no_grad()
def geometric_mask(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, low: float, high: float,
    **sequences: Unpack[Sequences],
) -> Float[Tensor, "N"]:
    """`sequence_mask` by the geometric mean of the tokens' ratios, which does not grow with the length.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        low, high: 0 <= low < 1 < high, near 1, since a mean over a sequence stays near 1.
        sequences: see `Sequences`.

    Reference: Liu et al. (2025), "When Speed Kills Stability", geometric-level rejection sampling (Geo-RS).
    """
    return _mask_alone(_geometric_ratio(old_logprobs, rollout_logprobs, **sequences), low, high)


# The three forms of a weight.


def _truncated(ratio: Float[Tensor, "N"], cap: float) -> Float[Tensor, "N"]:
    """min(r, cap)."""
    return ratio.clamp(max=cap)


def _masked(ratio: Float[Tensor, "N"], low: float, high: float) -> Float[Tensor, "N"]:
    """r where low <= r <= high, else 0."""
    return torch.where(_is_within(ratio, low, high), ratio, 0.0)


def _mask_alone(ratio: Float[Tensor, "N"], low: float, high: float) -> Float[Tensor, "N"]:
    """1 where low <= r <= high, else 0."""
    return _is_within(ratio, low, high).to(ratio.dtype)


def _is_within(ratio: Float[Tensor, "N"], low: float, high: float) -> Bool[Tensor, "N"]:
    return (ratio >= low) & (ratio <= high)


# The three levels of a ratio.


def _token_ratio(old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    """exp(old - mu) of each token."""
    return clamped_exp(at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs))


def _sequence_ratio(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"], num_sequences: int, is_mean: bool = False,
) -> Float[Tensor, "N"]:
    """exp of the sum of old - mu, or of its mean, over each token's sequence; 1 on tokens of none."""
    gap = torch.where(mask, at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs), 0.0)
    totals = sequence_sum(gap, sequence_ids, num_sequences=num_sequences)
    if is_mean:
        counts = sequence_sum(mask.to(gap.dtype), sequence_ids, num_sequences=num_sequences)
        totals = totals / counts.clamp(min=1)
    return torch.where(sequence_ids >= 0, clamped_exp(totals)[sequence_ids.clamp(min=0).long()], 1.0)


def _geometric_ratio(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], **sequences: Unpack[Sequences]
) -> Float[Tensor, "N"]:
    """exp of the mean of old - mu over each token's sequence; 1 on tokens of none."""
    return _sequence_ratio(old_logprobs, rollout_logprobs, **sequences, is_mean=True)
