"""Correcting for the gap between the engine that sampled and the trainer, at the same weights.

With mu the log-prob that the engine reported and old the trainer's own, each token was sampled from mu and is trained
as if from old: the exact weight is exp(old - mu), whose variance each function below bounds in its own way. All return
[N] weights without a gradient, for the policy-gradient loss of each token; 1 where engine and trainer agree.
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
    """A token counts by its ratio while that is within the bounds, and not at all outside.

        weight = exp(old - mu) where low <= exp(old - mu) <= high, else 0

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        low, high: 0 < low < 1 < high; 0.5 and 5 are usual.

    Reference: Ling Team (2025), arXiv:2510.18855, Sec. 3 (IcePop).
    """
    ratio = _ratio(old_logprobs, rollout_logprobs)
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


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
    """A sequence counts as it is while the ratio of its probabilities is within the bounds, and not at all outside.

        weight[t] = 1 where low <= exp(sum over the sequence of (old - mu)) <= high, else 0

    The sum grows with the length, so long completions are dropped first: watch what is kept, by length.

    Args:
        old_logprobs, rollout_logprobs: see `token_tis`.
        mask: tokens that the policy sampled; all masked tokens of a sequence must be in this pack.
        sequence_ids: which sequence each token belongs to; -1 on shared prompts.
        num_sequences: sequences of the step.
        low, high: 0 < low < 1 < high.

    Reference: Liu et al. (2025), "When Speed Kills Stability", sequence-level masked importance sampling.
    """
    totals, _ = _sequence_gap(old_logprobs, rollout_logprobs, mask, sequence_ids, num_sequences)
    return _within(totals, sequence_ids, low, high)


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
    """The same by the geometric mean of the tokens' ratios, which does not grow with the length.

        weight[t] = 1 where low <= exp(mean over the sequence of (old - mu)) <= high, else 0

    Args:
        mask, sequence_ids, num_sequences: see `sequence_mask`.
        low, high: 0 < low < 1 < high, near 1, since a mean over a sequence stays near 1.

    Reference: Liu et al. (2025), "When Speed Kills Stability", geometric-level masking.
    """
    totals, counts = _sequence_gap(old_logprobs, rollout_logprobs, mask, sequence_ids, num_sequences)
    return _within(totals / counts.clamp(min=1), sequence_ids, low, high)


def _ratio(old_logprobs: Float[Tensor, "N"], rollout_logprobs: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
    return clamped_exp(at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs))


def _sequence_gap(
    old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int
) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Sum of old - mu, and number of masked tokens, of each sequence."""
    gap = torch.where(mask, at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs), 0.0)
    totals = sequence_sum(gap, sequence_ids, num_sequences=num_sequences)
    return totals, sequence_sum(mask.to(gap.dtype), sequence_ids, num_sequences=num_sequences)


def _within(log_ratio: Float[Tensor, "B"], sequence_ids: Int[Tensor, "N"], low: float, high: float) -> Tensor:
    """1 on the tokens of sequences whose ratio is within the bounds, and on tokens of none."""
    ratio = clamped_exp(log_ratio)
    kept = ((ratio >= low) & (ratio <= high)).to(log_ratio.dtype)
    return torch.where(sequence_ids >= 0, kept[sequence_ids.clamp(min=0).long()], 1.0)
