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

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignlab.functional.precision import at_least_float32, clamped_exp
from alignlab.functional.reduction import sequence_sum


@torch.no_grad()
def token_tis(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, cap: float
) -> Float[Tensor, "N"]:
    """Truncated importance sampling: a token counts by its own ratio, at most `cap` times.

        weight = min(exp(old - mu), cap)

    Args:
        old_logprobs: under the trainer's weights before the update, nats.
        rollout_logprobs: as the engine reported, of the same weights, nats.
        cap: > 0; 2 is usual.

    Reference: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    """
    return _ratio(old_logprobs, rollout_logprobs).clamp(max=cap)


@torch.no_grad()
def icepop(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, low: float, high: float
) -> Float[Tensor, "N"]:
    """Masked importance sampling by token: a token counts by its ratio within the bounds, and not at all outside.

        weight = exp(old - mu) where low <= exp(old - mu) <= high, else 0

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        low, high: 0 <= low < 1 < high; 0.5 and 5 are usual.

    Reference: Ling Team (2025), arXiv:2510.18855, Sec. 3 (IcePop).
    """
    ratio = _ratio(old_logprobs, rollout_logprobs)
    return torch.where(_within(ratio, low, high), ratio, 0.0)


@torch.no_grad()
def token_mask(
    old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"], *, low: float, high: float
) -> Float[Tensor, "N"]:
    """Rejection by token: a token counts as it is while its ratio is within the bounds, and not at all outside.

        weight = 1 where low <= exp(old - mu) <= high, else 0

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        low, high: 0 <= low < 1 < high.

    Reference: Liu et al. (2025), "When Speed Kills Stability", rejection sampling, at the level of tokens.
    """
    ratio = _ratio(old_logprobs, rollout_logprobs)
    return _within(ratio, low, high).to(ratio.dtype)


@torch.no_grad()
def sequence_tis(
    old_logprobs: Float[Tensor, "N"],
    rollout_logprobs: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    num_sequences: int,
    cap: float,
) -> Float[Tensor, "N"]:
    """Truncated importance sampling by sequence: each token counts by the ratio of its sequence's probabilities.

        weight[t] = min(exp(sum over the sequence of (old - mu)), cap)

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        mask, sequence_ids, num_sequences: see `sequence_mask`.
        cap: > 0; 2 to 10 is usual.

    Reference: Liu et al. (2025), "When Speed Kills Stability", sequence-level truncated importance sampling.
    """
    ratio = _sequence_ratio(old_logprobs, rollout_logprobs, mask, sequence_ids, num_sequences)
    return ratio.clamp(max=cap)


@torch.no_grad()
def sequence_mis(
    old_logprobs: Float[Tensor, "N"],
    rollout_logprobs: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    num_sequences: int,
    low: float,
    high: float,
) -> Float[Tensor, "N"]:
    """Masked importance sampling by sequence: a sequence counts by its ratio within the bounds, and not at all outside.

        weight[t] = r where low <= r <= high, else 0        r = exp(sum over the sequence of (old - mu))

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        mask, sequence_ids, num_sequences: see `sequence_mask`.
        low, high: 0 <= low < 1 < high. The paper and TRL bound the ratio from above alone, which is low = 0.

    Reference: Liu et al. (2025), "When Speed Kills Stability", sequence-level masked importance sampling.
    """
    ratio = _sequence_ratio(old_logprobs, rollout_logprobs, mask, sequence_ids, num_sequences)
    return torch.where(_within(ratio, low, high), ratio, 0.0)


@torch.no_grad()
def sequence_mask(
    old_logprobs: Float[Tensor, "N"],
    rollout_logprobs: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    num_sequences: int,
    low: float,
    high: float,
) -> Float[Tensor, "N"]:
    """Rejection by sequence: a sequence counts as it is while its ratio is within the bounds, and not at all outside.

        weight[t] = 1 where low <= exp(sum over the sequence of (old - mu)) <= high, else 0

    The sum grows with the length, so long completions are dropped first: watch what is kept, by length. TRL's
    `sequence_mask` also weighs what it keeps: that is `sequence_mis`.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        mask: tokens that the policy sampled; all masked tokens of a sequence must be in this pack.
        sequence_ids: which sequence each token belongs to; -1 on shared prompts.
        num_sequences: sequences of the step.
        low, high: 0 <= low < 1 < high.

    Reference: Liu et al. (2025), "When Speed Kills Stability", sequence-level rejection sampling.
    """
    ratio = _sequence_ratio(old_logprobs, rollout_logprobs, mask, sequence_ids, num_sequences)
    return _within(ratio, low, high).to(ratio.dtype)


@torch.no_grad()
def geometric_mis(
    old_logprobs: Float[Tensor, "N"],
    rollout_logprobs: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    num_sequences: int,
    low: float,
    high: float,
) -> Float[Tensor, "N"]:
    """`sequence_mis` by the geometric mean of the tokens' ratios, which does not grow with the length.

        weight[t] = g where low <= g <= high, else 0        g = exp(mean over the sequence of (old - mu))

    g is no importance weight: it is the sequence's ratio to the power 1 / length, of low variance and biased.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        mask, sequence_ids, num_sequences: see `sequence_mask`.
        low, high: see `geometric_mask`.

    Reference: Liu et al. (2025), "When Speed Kills Stability", geometric-level masked importance sampling (Geo-MIS).
    """
    ratio = _geometric_ratio(old_logprobs, rollout_logprobs, mask, sequence_ids, num_sequences)
    return torch.where(_within(ratio, low, high), ratio, 0.0)


@torch.no_grad()
def geometric_mask(
    old_logprobs: Float[Tensor, "N"],
    rollout_logprobs: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    num_sequences: int,
    low: float,
    high: float,
) -> Float[Tensor, "N"]:
    """`sequence_mask` by the geometric mean of the tokens' ratios, which does not grow with the length.

        weight[t] = 1 where low <= exp(mean over the sequence of (old - mu)) <= high, else 0

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        mask, sequence_ids, num_sequences: see `sequence_mask`.
        low, high: 0 <= low < 1 < high, near 1, since a mean over a sequence stays near 1.

    Reference: Liu et al. (2025), "When Speed Kills Stability", geometric-level rejection sampling (Geo-RS).
    """
    ratio = _geometric_ratio(old_logprobs, rollout_logprobs, mask, sequence_ids, num_sequences)
    return _within(ratio, low, high).to(ratio.dtype)


def _ratio(old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    return clamped_exp(at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs))


def _sequence_ratio(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int
) -> Float[Tensor, "N"]:
    """exp of the sum of old - mu over each token's sequence; 1 on tokens of none."""
    totals, _ = _sequence_gap(old_logprobs, rollout_logprobs, mask, sequence_ids, num_sequences)
    return _on_tokens(totals, sequence_ids)


def _geometric_ratio(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int
) -> Float[Tensor, "N"]:
    """exp of the mean of old - mu over each token's sequence; 1 on tokens of none."""
    totals, counts = _sequence_gap(old_logprobs, rollout_logprobs, mask, sequence_ids, num_sequences)
    return _on_tokens(totals / counts.clamp(min=1), sequence_ids)


def _sequence_gap(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Sum of old - mu, and number of masked tokens, of each sequence."""
    gap = torch.where(mask, at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs), 0.0)
    totals = sequence_sum(gap, sequence_ids, num_sequences=num_sequences)
    return totals, sequence_sum(mask.to(gap.dtype), sequence_ids, num_sequences=num_sequences)


def _on_tokens(log_ratio: Float[Tensor, "B"], sequence_ids: Int[Tensor, "N"]) -> Float[Tensor, "N"]:
    ratio = clamped_exp(log_ratio)
    return torch.where(sequence_ids >= 0, ratio[sequence_ids.clamp(min=0).long()], 1.0)


def _within(ratio: Float[Tensor, "N"], low: float, high: float) -> Bool[Tensor, "N"]:
    return (ratio >= low) & (ratio <= high)
