"""Losses of preferences between completions, from their summed log-probs. [P] tensors, one value a pair; [B], one value
a completion.

A completion's log-ratio is log p under the policy less log p under the reference, summed over its tokens. The margin
of a pair is the chosen one's log-ratio less the rejected one's; beta times a log-ratio is the completion's implicit
reward. Every loss of margins is at its value for a margin of 0 where policy and reference are equal.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.functional.precision import at_least_float32


def dpo_sigmoid(
    margins: Float[Tensor, "P"], *, beta: float, label_smoothing: float | Float[Tensor, "P"] = 0.0
) -> Float[Tensor, "P"]:
    """Direct preference optimisation; with smoothing, conservative DPO.

        loss = -(1 - s) log sigmoid(beta m) - s log sigmoid(-beta m)

    Args:
        margins: m, carries the gradient.
        beta: > 0, strength of the KL to the reference; 0.1 is usual.
        label_smoothing: s, probability that a label is wrong, in [0, 0.5]; of all pairs, or of each, where a judge's
            soft labels are known.

    Returns:
        [P]; log 2 where policy and reference are equal.

    Reference: Rafailov et al. (2023), arXiv:2305.18290, Eq. 7; cDPO: Mitchell (2023), "A note on DPO with noisy
    preferences".
    """
    scaled = beta * at_least_float32(margins)
    return -(1 - label_smoothing) * logsigmoid(scaled) - label_smoothing * logsigmoid(-scaled)


def dpo_robust(margins: Float[Tensor, "P"], *, beta: float, label_smoothing: float) -> Float[Tensor, "P"]:
    """DPO whose expectation over labels flipped with probability s is that of clean ones.

        loss = (-(1 - s) log sigmoid(beta m) + s log sigmoid(-beta m)) / (1 - 2 s)

    Args:
        margins, beta: see `dpo_sigmoid`.
        label_smoothing: s, the rate of flipped labels, in [0, 0.5).

    Reference: Chowdhury et al. (2024), arXiv:2403.00409, Eq. 12.
    """
    scaled = beta * at_least_float32(margins)
    as_labelled, flipped = -logsigmoid(scaled), -logsigmoid(-scaled)
    return ((1 - label_smoothing) * as_labelled - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def ipo(margins: Float[Tensor, "P"], *, beta: float) -> Float[Tensor, "P"]:
    """Identity preference optimisation: the margin is to be 1 / (2 beta), and not as large as can be.

        loss = (m - 1 / (2 beta))^2

    Args:
        margins: of summed log-ratios, as in the paper; or of log-ratios averaged over each completion's tokens, as its
            authors recommend in later code. Which one is the caller's choice.
        beta: tau of the paper, > 0.

    Reference: Azar et al. (2023), arXiv:2310.12036, Eq. 17.
    """
    return (at_least_float32(margins) - 1 / (2 * beta)).square()


def hinge(margins: Float[Tensor, "P"], *, beta: float) -> Float[Tensor, "P"]:
    """Hinge loss of the margin; a margin above 1 / beta costs nothing.

        loss = max(0, 1 - beta m)

    Reference: Zhao et al. (2023), SLiC-HF, arXiv:2305.10425, Eq. 2; Liu et al. (2024), RSO, arXiv:2309.06657, Eq. 11.
    """
    return (1 - beta * at_least_float32(margins)).relu()


def simpo(
    chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"], *, beta: float, gamma: float
) -> Float[Tensor, "P"]:
    """Preference without a reference: mean log-probs, and a margin that the chosen one must lead by.

        loss = -log sigmoid(beta (mean log p(chosen) - mean log p(rejected)) - gamma)

    Args:
        chosen, rejected: log p a token, averaged over each completion; carry the gradient.
        beta: > 0; 2 to 2.5 in the paper.
        gamma: >= 0, the target margin of beta-scaled means; about half of beta in the paper.

    Reference: Meng et al. (2024), arXiv:2405.14734, Eq. 6.
    """
    return -logsigmoid(beta * (at_least_float32(chosen) - at_least_float32(rejected)) - gamma)


def orpo_odds(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Odds-ratio part of ORPO, to be weighted and added to the likelihood loss of the chosen completion.

        odds(p) = p / (1 - p),  p = exp(mean log p a token)
        loss    = -log sigmoid(log odds(chosen) - log odds(rejected))

    Args:
        chosen, rejected: log p a token, averaged over each completion, <= 0; carry the gradient.

    Reference: Hong et al. (2024), arXiv:2403.07691, Eqs. 3, 7.
    """
    return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def kto_reference_point(log_ratio_sum: Float[Tensor, ""], count: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Reference point of KTO: an estimate of the KL of policy and reference, against which log-ratios are compared.

        z = max(0, log_ratio_sum / count), without a gradient

    Args:
        log_ratio_sum: log-ratios of completions of other prompts than those they follow, summed, nats.
        count: how many completions, >= 1; over all packs and ranks, as the sum is.

    Reference: Ethayarajh et al. (2024), arXiv:2402.01306, Sec. 4.1.
    """
    return (at_least_float32(log_ratio_sum) / count).clamp(min=0).detach()


def kto(
    log_ratios: Float[Tensor, "B"], desirable: Bool[Tensor, "B"], reference_point: Float[Tensor, ""],
    *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> Float[Tensor, "B"]:
    """Kahneman-Tversky optimisation: each completion is good or bad by itself, against how far the policy has moved.

        desirable:    w_D (1 - sigmoid(beta (r - z)))
        undesirable:  w_U (1 - sigmoid(beta (z - r)))

    Args:
        log_ratios: r of each completion, nats; carries the gradient.
        desirable: which are good.
        reference_point: z, see `kto_reference_point`; no gradient.
        beta: > 0, how soon a gain or a loss saturates; 0.1 is usual.
        desirable_weight, undesirable_weight: > 0, to balance unequal numbers of the two.

    Returns:
        [B], from 0 to the weight; half of the weight at r = z.

    Reference: Ethayarajh et al. (2024), arXiv:2402.01306, Eq. 8, with lambda_y left out: it has no gradient.
    """
    lead = beta * (at_least_float32(log_ratios) - at_least_float32(reference_point).detach())
    good = desirable_weight * (1 - torch.sigmoid(lead))
    bad = undesirable_weight * (1 - torch.sigmoid(-lead))
    return torch.where(desirable, good, bad)


def _log_odds(mean_logprob: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """log(p / (1 - p)) of p = exp(mean_logprob); p is kept below 1 by a rounding step."""
    x = at_least_float32(mean_logprob).clamp(max=-torch.finfo(torch.float32).eps)
    return x - torch.log(-torch.expm1(x))
