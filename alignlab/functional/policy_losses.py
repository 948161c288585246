"""Surrogates of the policy gradient: per-token losses, to be minimised, and the ratio they used.

All take and return [N] tensors, one value a token. The exponent of every ratio is clamped at 20 from above before exp:
a token past that is clipped or hopeless, and gets no gradient instead of an infinite one. Masking and averaging are
`reduction`'s; values off the mask are finite and meaningless.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignlab.functional.precision import at_least_float32, clamped_exp
from alignlab.functional.reduction import on_tokens, sequence_mean

Losses = tuple[Float[Tensor, "N"], Float[Tensor, "N"]]


def ppo_clip(
    logprobs: Float[Tensor, "N"],
    old_logprobs: Float[Tensor, "N"],
    advantages: Float[Tensor, "N"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None = None,
) -> Losses:
    """Clipped surrogate loss of each token, to be minimised.

        ratio = exp(logprobs - old_logprobs)
        loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
        loss  = min(loss, -dual_clip * A) where A < 0, if dual_clip is given

    Args:
        logprobs: log p of each token under the policy in training, nats; carries the gradient.
        old_logprobs: the same before this update; no gradient.
        advantages: advantage of each token; the caller spreads a per-completion advantage.
        clip_low, clip_high: distances from 1, > 0. Equal in PPO; high > low in DAPO.
        dual_clip: > 1; bounds the loss, and stops the gradient, of bad tokens that became far likelier.

    Returns:
        (loss, ratio), both [N].

    Reference: Schulman et al. (2017), arXiv:1707.06347, Eq. 7; separate bounds: Yu et al. (2025), DAPO,
        arXiv:2503.14476, Eq. 10; dual clip: Ye et al. (2020), arXiv:1912.09729, Sec. 3.3.
    """
    ratio = clamped_exp(at_least_float32(logprobs) - at_least_float32(old_logprobs).detach())
    advantages = at_least_float32(advantages)
    loss = _clipped(ratio, advantages, clip_low=clip_low, clip_high=clip_high)
    if dual_clip is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)
    return loss, ratio


def gspo_clip(
    logprobs: Float[Tensor, "N"],
    old_logprobs: Float[Tensor, "N"],
    advantages: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    num_sequences: int,
    clip_low: float,
    clip_high: float,
) -> Losses:
    """Clipped surrogate with one ratio a sequence, the geometric mean of its tokens' ratios.

        s[b]    = exp(mean over masked tokens t of b of (logprobs[t] - old_logprobs[t]))
        loss[t] = -min(s * A[t], clip(s, 1 - clip_low, 1 + clip_high) * A[t])        s of t's sequence

    The gradient runs through s, so every token of a sequence gets the same factor and a sequence is clipped as a
    whole. With `sequence_mean_weights` and one advantage a sequence the sum is the paper's Eq. 5. The token-level form
    (GSPO-token, Eq. 14), sg(s) * exp(logprobs - sg(logprobs)) in place of s, has the same value and, with one advantage
    a sequence, the same gradient; it differs only where advantages vary inside a sequence, and is not this function.

    Args:
        logprobs: log p of each token under the policy in training, nats; carries the gradient.
        old_logprobs: the same before this update; no gradient.
        advantages: advantage of each token; the caller spreads a per-completion advantage.
        mask: tokens that the policy sampled; all masked tokens of a sequence must be in this pack.
        sequence_ids: which sequence each token belongs to; -1 on shared prompts, whose ratio is 1.
        num_sequences: B, sequences of the step.
        clip_low, clip_high: distances from 1, > 0; about 3e-4 and 4e-4, since s is a mean over a whole sequence.

    Returns:
        (loss, ratio), both [N]; ratio is s, spread over the sequence's tokens.

    Reference: Zheng et al. (2025), arXiv:2507.18071, Eqs. 5 to 7.
    """
    log_ratio = at_least_float32(logprobs) - at_least_float32(old_logprobs).detach()
    mean_log_ratio = sequence_mean(log_ratio, mask, sequence_ids, num_sequences=num_sequences)
    ratio = on_tokens(clamped_exp(mean_log_ratio), sequence_ids, elsewhere=1.0)
    return _clipped(ratio, at_least_float32(advantages), clip_low=clip_low, clip_high=clip_high), ratio


def cispo(
    logprobs: Float[Tensor, "N"],
    old_logprobs: Float[Tensor, "N"],
    advantages: Float[Tensor, "N"],
    *,
    clip_high: float,
) -> Losses:
    """Policy gradient with a truncated importance weight: no token loses its gradient to clipping.

        ratio = exp(logprobs - old_logprobs)
        loss  = -sg(min(ratio, 1 + clip_high)) * A * logprobs        sg: no gradient

    The bound is 1 + clip_high, not clip_high. There is no lower bound, as in the paper's experiments.

    Args:
        logprobs: log p of each token under the policy in training, nats; carries the gradient.
        old_logprobs: the same before this update; no gradient.
        advantages: advantage of each token; the caller spreads a per-completion advantage.
        clip_high: distance of the bound from 1, > 0.

    Returns:
        (loss, ratio), both [N].

    Reference: MiniMax (2025), MiniMax-M1, arXiv:2506.13585, Eqs. 4 and 5.
    """
    logprobs = at_least_float32(logprobs)
    ratio = clamped_exp(logprobs - at_least_float32(old_logprobs).detach())
    weight = ratio.detach().clamp(max=1.0 + clip_high)
    return -weight * at_least_float32(advantages) * logprobs, ratio


def reinforce(logprobs: Float[Tensor, "N"], advantages: Float[Tensor, "N"]) -> Losses:
    """Plain policy gradient, for tokens sampled from the policy in training: one update a batch of rollouts.

        loss = -A * logprobs

    Args:
        logprobs: log p of each token under the policy in training, nats; carries the gradient.
        advantages: advantage of each token; the caller spreads a per-completion advantage.

    Returns:
        (loss, ratio), both [N]; ratio is 1 everywhere, because no old policy enters.

    Reference: Williams (1992), REINFORCE, doi:10.1007/BF00992696; for language models: Ahmadian et al. (2024),
        arXiv:2402.14740, Sec. 2.2.
    """
    logprobs = at_least_float32(logprobs)
    return -at_least_float32(advantages) * logprobs, torch.ones_like(logprobs)


@torch.no_grad()
def clip_acts(
    ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"], *, clip_low: float, clip_high: float
) -> Bool[Tensor, "N"]:
    """Return where `ppo_clip` and `gspo_clip` clip: below the lower bound if A < 0, above the upper one if A > 0."""
    return ((advantages < 0) & (ratio < 1.0 - clip_low)) | ((advantages > 0) & (ratio > 1.0 + clip_high))


def _clipped(
    ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"], *, clip_low: float, clip_high: float
) -> Float[Tensor, "N"]:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)."""
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    return -torch.minimum(ratio * advantages, bounded * advantages)
