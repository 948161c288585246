"""The reverse KL to a teacher as an advantage of each token that the student sampled.

Shapes: N tokens of one pack, B sequences; for spans, N tokens of the student and M of the teacher write one text.
`-(teacher_logprobs - old_logprobs)` is the estimate k1, from the sample itself, of KL(student || teacher).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignlab.functional.precision import at_least_float32
from alignlab.functional.reduction import sequence_sum
from alignlab.functional.values import gae


def reverse_kl_advantages(
    teacher_logprobs: Float[Tensor, "N"],
    old_logprobs: Float[Tensor, "N"],
    *,
    mask: Bool[Tensor, "N"],
    sequence_ids: Int[Tensor, "N"],
    num_sequences: int,
    discount: float,
    normalize_length: bool,
) -> Float[Tensor, "N"]:
    """Advantage of each token: its log-prob under the teacher less that under the student, and the discounted future.

        r[i] = teacher[i] - old[i]
        F[i] = sum over j > i of discount^(j - i) * r[j]
        A[i] = r[i] + F[i]                                                          as it is, or
        A[i] = r[i] + F[i] / (sum over j > i of discount^(j - i))                   where the length is normalised

    i counts a sequence's masked tokens. With discount 0 a token answers for itself: the policy gradient of A is that of
    KL(student || teacher) at each state visited, how often it is visited being held fixed, as in on-policy distillation
    by the reverse KL (Agarwal et al.). With discount 1 it is the gradient of the KL of whole sequences: A[i] is R_t of
    MiniLLM's Eq. 2, whose "- 1" is a baseline that changes no expectation. Normalised, the single step r and the
    mean of what follows are added as in MiniLLM's single-step decomposition (Eq. 3) with its length normalisation
    (R_{t+1}^Norm), so that long completions do not outweigh short ones. What MiniLLM has besides is left out: the
    single step summed over the vocabulary instead of sampled, and sampling from a mixture with the teacher.

    Args:
        teacher_logprobs: log p of each token under the teacher, nats, at the temperature sampled at.
        old_logprobs: the same under the student that sampled, without a gradient.
        mask: tokens that the student sampled.
        sequence_ids: which sequence each token belongs to; -1 on shared prompts.
        num_sequences: B.
        discount: in [0, 1].
        normalize_length: divide the future by its weight; nothing follows the last token, whose future is 0.

    Returns:
        [N], 0 off the mask.

    Reference: Agarwal et al. (2023), GKD, arXiv:2306.13649, Sec. 3; Gu et al. (2023), MiniLLM, arXiv:2306.08543,
    Sec. 2.2.
    """
    rewards = torch.where(mask, at_least_float32(teacher_logprobs) - at_least_float32(old_logprobs), 0.0)
    zeros = torch.zeros_like(rewards)

    def with_future(x: Float[Tensor, "N"]) -> Float[Tensor, "N"]:
        return gae(x, zeros, mask=mask, sequence_ids=sequence_ids, num_sequences=num_sequences, gamma=discount, lam=1.0)

    whole = with_future(rewards)
    if not normalize_length:
        return whole
    weight = with_future(mask.to(rewards.dtype)) - mask.to(rewards.dtype)
    return rewards + torch.where(weight > 0, (whole - rewards) / weight.clamp(min=1e-12), 0.0)


def spread_over_spans(
    old_logprobs: Float[Tensor, "N"],
    spans: Int[Tensor, "N"],
    teacher_logprobs: Float[Tensor, "M"],
    teacher_spans: Int[Tensor, "M"],
    *,
    num_spans: int,
) -> Float[Tensor, "N"]:
    """Spread a teacher's log-probs over the student's tokens of the same text.

        result[i] = old[i] + (T[s] - S[s]) / n[s]              s the span of i

    S and T are the sums over a span's tokens, the student's (n of them) and the teacher's: within a span the difference
    is spread evenly, since nothing tells which token it is due to, and the result sums to T. Where every span is one
    token of each, the result is the teacher's log-probs.

    Args:
        old_logprobs: of the student's tokens of one completion, nats.
        spans: the span of each, ascending from 0.
        teacher_logprobs: of the teacher's tokens, nats.
        teacher_spans: the span of each.
        num_spans: each has at least one token of the student's.
    """
    old, teacher = at_least_float32(old_logprobs), at_least_float32(teacher_logprobs)
    difference = sequence_sum(teacher, teacher_spans, num_sequences=num_spans)
    difference = difference - sequence_sum(old, spans, num_sequences=num_spans)
    counts = sequence_sum(torch.ones_like(old), spans, num_sequences=num_spans)
    return old + (difference / counts.clamp(min=1))[spans]
