"""Divergences between a teacher's and a student's distribution of the next token.

Written P for the teacher and Q for the student, both at one temperature and over one range of ids. Every divergence is
one of each token's distribution, [M], and is 0 where the two agree. From hidden states they come chunk by chunk: the
logits of a chunk are made, compared, dropped, and made again in the backward pass, so that those of both models exist
for `chunk_tokens` tokens at one time, forward and backward.

Shapes: M tokens, V ids that are compared, K of them that are kept of the teacher, D_s and D_t hidden sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from alignlab.functional.logprobs import head_logits
from alignlab.functional.precision import at_least_float32

CHUNK_TOKENS = 512
"""Both models' distributions of a chunk are held in float32, a dozen tensors of that size."""


class Head(NamedTuple):
    """Output head: weight [V, D], bias [V] and soft-cap; see `head_logits`."""

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None


class TopTokens(NamedTuple):
    """The likeliest tokens of a teacher's distributions, and the probability of all other ids together.

    Attributes:
        ids: [M, K], the likeliest first.
        logprobs: [M, K] of these, nats.
        other_logprob: [M], log of the probability of all other ids together; -inf where there is no other (K = V).
    """

    ids: Tensor
    logprobs: Tensor
    other_logprob: Tensor


def divergence(
    teacher: Float[Tensor, "M V"], student: Float[Tensor, "M V"], *, beta: float
) -> Float[Tensor, "M"]:
    """Generalised Jensen-Shannon divergence of each token's distributions.

        beta = 0:      KL(P || Q)                                    forward KL
        0 < beta < 1:  beta KL(P || R) + (1 - beta) KL(Q || R),      R = beta P + (1 - beta) Q
        beta = 1:      KL(Q || P)                                    reverse KL

    The two ends are not limits of the middle, which vanishes there; JSD / beta tends to KL(P || Q) as beta tends to 0,
    and JSD / (1 - beta) to KL(Q || P) as beta tends to 1. The gradients by the logits are those of the losses as
    written. TRL's `generalized_jsd_loss` has the same convention.

    Args:
        teacher: log P of every id, nats.
        student: log Q of every id, nats; carries the gradient.
        beta: from 0 to 1; the weight of the teacher in the mixture.

    Reference: Agarwal et al. (2023), GKD, arXiv:2306.13649, Eq. 1.
    """
    _require_beta(beta)
    teacher, student = at_least_float32(teacher), at_least_float32(student)
    if beta == 0:
        return _kl(teacher, student)
    if beta == 1:
        return _kl(student, teacher)
    mixture = torch.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(student, mixture)


def coarse_divergence(
    top: TopTokens, student: Float[Tensor, "M V"], *, beta: float
) -> Float[Tensor, "M"]:
    """`divergence` of both distributions when all ids but the teacher's K likeliest count as one event.

        P' = (p_1, .., p_K, 1 - sum p),  Q' = (q_1, .., q_K, 1 - sum q)  of the same ids

    For every beta it is at most the divergence of the whole distributions (the data-processing inequality), and equal
    to it at K = V, or where P and Q are proportional to each other outside of the K.

    Args:
        top: of the teacher.
        student: log Q of every id, nats; carries the gradient.
        beta: see `divergence`.

    Reference: the inequality: Cover & Thomas (2006), Elements of Information Theory, ch. 2.
    """
    ids = top.ids.long()
    log_q, log_p = student.gather(1, ids), at_least_float32(top.logprobs).to(student.dtype)
    if ids.shape[1] == student.shape[1]:
        return divergence(log_p, log_q, beta=beta)
    # The other ids are summed: 1 less the sum of the K would cancel where that is nearly 1.
    other_q = student.scatter(1, ids, -math.inf).logsumexp(-1, keepdim=True)
    log_p = torch.cat([log_p, top.other_logprob[:, None].to(log_p)], dim=1)
    return divergence(log_p, torch.cat([log_q, other_q], dim=1), beta=beta)


def log_distribution(
    hidden: Float[Tensor, "M D"], head: Head, *, width: int, temperature: float
) -> Float[Tensor, "M {width}"]:
    """Log-probs over the first `width` ids; ids beyond them are left out of the softmax.

        log_softmax(head_logits(hidden)[:width] / temperature)

    Models pad their vocabulary, each its own way; P and Q are compared where the tokenizer has tokens.

    Args:
        width: ids that are compared, 1 up to the rows of the head.
        temperature: > 0.
    """
    if not 1 <= width <= len(head.weight):
        raise ValueError(f"width is {width}, and must be from 1 to the head's {len(head.weight)} logits")
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, and must be > 0; use 1")
    bias = None if head.bias is None else head.bias[:width]
    logits = head_logits(hidden, head.weight[:width], bias=bias, softcap=head.softcap)
    return (logits / temperature).log_softmax(-1)


def chunked_divergence(
    student_hidden: Float[Tensor, "M D_s"],
    student_head: Head,
    teacher_hidden: Float[Tensor, "M D_t"],
    teacher_head: Head,
    *,
    beta: float,
    width: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "M"]:
    """`divergence` of the distributions that two models' hidden states give; gradients reach the student's hidden
    states and, where it is in training, its head.

    Args:
        student_hidden, teacher_hidden: hidden states that predict the same tokens, after the last norm.
        beta: see `divergence`.
        width, temperature: see `log_distribution`, the same for both.
        chunk_tokens: tokens whose logits exist at one time; default: `CHUNK_TOKENS`.
    """

    def compare(hidden: Tensor, weight: Tensor, bias: Tensor | None, hidden_of_teacher: Tensor) -> Tensor:
        head = Head(weight, bias, student_head.softcap)
        with torch.no_grad():
            teacher = log_distribution(hidden_of_teacher, teacher_head, width=width, temperature=temperature)
        return divergence(teacher, log_distribution(hidden, head, width=width, temperature=temperature), beta=beta)

    return _in_chunks(compare, student_hidden, student_head, [teacher_hidden], chunk_tokens)


def chunked_coarse_divergence(
    student_hidden: Float[Tensor, "M D_s"],
    student_head: Head,
    top: TopTokens,
    *,
    beta: float,
    width: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Float[Tensor, "M"]:
    """`coarse_divergence` between a teacher's top tokens and the distributions that a student's hidden states give.

    Args:
        top: of the teacher, at the same width and temperature.
        beta, width, temperature, chunk_tokens: see `chunked_divergence`.
    """

    def compare(hidden: Tensor, weight: Tensor, bias: Tensor | None, *top_tensors: Tensor) -> Tensor:
        head = Head(weight, bias, student_head.softcap)
        student = log_distribution(hidden, head, width=width, temperature=temperature)
        return coarse_divergence(TopTokens(*top_tensors), student, beta=beta)

    return _in_chunks(compare, student_hidden, student_head, list(top), chunk_tokens)


@torch.no_grad()
def chunked_top_tokens(
    hidden: Float[Tensor, "M D"], head: Head, *, k: int, width: int, temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> TopTokens:
    """Return the K likeliest tokens of each distribution, and the probability of all others; no gradient.

    Args:
        k: K, 1 up to `width`.
        width, temperature: see `log_distribution`.
        chunk_tokens: tokens whose logits exist at one time.
    """
    if not 1 <= k <= width:
        raise ValueError(f"k is {k}, and must be from 1 to the {width} ids that are compared")
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    logprobs = hidden.new_empty(len(hidden), k, dtype=torch.promote_types(hidden.dtype, torch.float32))
    other_logprob = torch.empty_like(logprobs[:, 0])
    for chunk in _slices(len(hidden), chunk_tokens):
        log_p = log_distribution(hidden[chunk], head, width=width, temperature=temperature)
        logprobs[chunk], ids[chunk] = log_p.topk(k, dim=-1)
        other_logprob[chunk] = log_p.scatter(1, ids[chunk], -math.inf).logsumexp(-1)
    return TopTokens(ids, logprobs, other_logprob)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q), the sum over the last dimension, of finite log-probs."""
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _in_chunks(
    compare: Callable[..., Tensor], hidden: Tensor, head: Head, teacher: Sequence[Tensor], chunk_tokens: int | None
) -> Tensor:
    """Call `compare(hidden, weight, bias, *teacher)` on each chunk; it is computed again in the backward pass.

    Without a token one empty chunk is compared: other ranks wait for this rank's gradient of the head, which is 0.
    """
    divergences = [
        checkpoint(
            compare, hidden[chunk], head.weight, head.bias, *(tensor[chunk] for tensor in teacher),
            use_reentrant=False, preserve_rng_state=False,
        )
        for chunk in (*_slices(len(hidden), chunk_tokens),) or (slice(0, 0),)
    ]
    return torch.cat(divergences)


def _slices(length: int, chunk_tokens: int | None) -> Iterator[slice]:
    step = CHUNK_TOKENS if chunk_tokens is None else chunk_tokens
    if step < 1:
        raise ValueError(f"chunk_tokens is {step}, and must be at least 1; 512 is usual")
    return (slice(start, start + step) for start in range(0, length, step))


def _require_beta(beta: float) -> None:
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta}, and must be from 0 (forward KL) to 1 (reverse KL); use 0.5")
