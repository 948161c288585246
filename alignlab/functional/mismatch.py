"""Weights that correct for the gap between the engine that sampled and the trainer, at the same weights.

With mu the log-prob that the engine reported and old the trainer's own, each token was sampled from mu and is trained
as if from old. Its exact weight is a ratio of probabilities, and each correction bounds the variance of that ratio in
its own way. A ratio r has one of three levels, and a weight is made of r in one of three forms:

                                                   truncated         masked importance    mask alone
                                                   min(r, high)      r, or 0 outside      1, or 0 outside
    token      r = exp(old - mu)                   token_tis         icepop               token_mask
    sequence   r = exp(sum of (old - mu))          sequence_tis      sequence_mis         sequence_mask
    geometric  r = exp(mean of (old - mu))                           geometric_mis        geometric_mask

"Outside" is r < low or r > high. The ratio of a sequence is the exact one of a whole completion, and grows with its
length, so that long completions are dropped first. The ratio of a token leaves out what came before the token. The
geometric mean is the sequence's ratio to the power 1 / length: no importance weight, but a measure of distance that
does not depend on the length.

References: token_tis: Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
icepop: Ling Team (2025), arXiv:2510.18855, Sec. 3. The others: Liu et al. (2025), "When Speed Kills Stability":
truncated (TIS) and masked (MIS) importance sampling and rejection sampling, by token, sequence and geometric mean.

Names elsewhere: TRL's token_truncate, token_mask, sequence_truncate, sequence_mask are token_tis, icepop, sequence_tis
and sequence_mis; verl's rollout_is token and sequence are the truncated forms, its rollout_rs token_k1, seq_sum_k1 and
seq_mean_k1 the masks alone, with bounds of the inverse ratio.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignlab.functional.precision import at_least_float32, clamped_exp
from alignlab.functional.reduction import on_tokens, sequence_mean, sequence_sum


@torch.no_grad()
def mismatch_weights(
    correction: str,
    old_logprobs: Float[Tensor, "N"],
    rollout_logprobs: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    num_sequences: int,
    low: float = 0.0,
    high: float,
) -> Float[Tensor, "N"]:
    """Weight of each token in the policy-gradient loss, without a gradient; 1 where engine and trainer agree.

    A token of weight 0 still counts in the denominator of the step's loss.

    Args:
        correction: a name in the table at the top of this module.
        old_logprobs: under the trainer's weights before the update, nats.
        rollout_logprobs: as the engine reported, of the same weights, nats.
        mask: tokens that the policy sampled; all masked tokens of a sequence must be in this pack.
        sequence_ids: which sequence each token belongs to; -1 on shared prompts.
        num_sequences: sequences of the step.
        low: 0 <= low < 1; the truncated forms do not read it. Usual: 0.5 for icepop; 0 for sequence_mis in the paper
            and in TRL; near 1 for the geometric mean.
        high: > 1. Usual: 2 for token_tis, 2 to 10 for sequence_tis, 5 for icepop; near 1 for the geometric mean.
    """
    level, form = _CORRECTIONS[correction]
    gap = at_least_float32(old_logprobs) - at_least_float32(rollout_logprobs)
    return form(clamped_exp(level(gap, mask, sequence_ids, num_sequences)), low, high)


def _by_token(gap: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Float[Tensor, "N"]:
    return gap


def _by_sequence(gap: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Float[Tensor, "N"]:
    """Return the sum of each token's sequence; 0 on tokens of no sequence."""
    total = sequence_sum(torch.where(mask, gap, 0.0), sequence_ids, num_sequences=num_sequences)
    return on_tokens(total, sequence_ids, elsewhere=0.0)


def _by_mean(gap: Tensor, mask: Tensor, sequence_ids: Tensor, num_sequences: int) -> Float[Tensor, "N"]:
    """Return the mean of each token's sequence; 0 on tokens of no sequence."""
    mean = sequence_mean(gap, mask, sequence_ids, num_sequences=num_sequences)
    return on_tokens(mean, sequence_ids, elsewhere=0.0)


def _truncated(ratio: Tensor, low: float, high: float) -> Float[Tensor, "N"]:
    return ratio.clamp(max=high)


def _masked(ratio: Tensor, low: float, high: float) -> Float[Tensor, "N"]:
    return torch.where((ratio >= low) & (ratio <= high), ratio, 0.0)


def _mask_alone(ratio: Tensor, low: float, high: float) -> Float[Tensor, "N"]:
    return ((ratio >= low) & (ratio <= high)).to(ratio.dtype)


_Level = Callable[[Tensor, Tensor, Tensor, int], Tensor]
_Form = Callable[[Tensor, float, float], Tensor]
_CORRECTIONS: dict[str, tuple[_Level, _Form]] = {
    "token_tis": (_by_token, _truncated),
    "icepop": (_by_token, _masked),
    "token_mask": (_by_token, _mask_alone),
    "sequence_tis": (_by_sequence, _truncated),
    "sequence_mis": (_by_sequence, _masked),
    "sequence_mask": (_by_sequence, _mask_alone),
    "geometric_mis": (_by_mean, _masked),
    "geometric_mask": (_by_mean, _mask_alone),
}
