"""Losses of a reward model, from the rewards of two completions of one prompt, and how far its odds can be trusted.

[P] tensors, one value a pair. A pair's lead is the chosen completion's reward less the rejected one's; sigmoid(lead) is
the model's probability that the chosen one is better (Bradley and Terry, 1952).
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from alignlab.functional.precision import at_least_float32
from alignlab.functional.reduction import sequence_sum


def bradley_terry(
    chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"], *, margins: Float[Tensor, "P"] | None = None,
    probabilities: Float[Tensor, "P"] | None = None,
) -> Float[Tensor, "P"]:
    """Negative log-likelihood of the preference; the chosen completion is to lead, by a margin where one is known.

        x    = r_chosen - r_rejected - m
        loss = -p log sigmoid(x) - (1 - p) log sigmoid(-x)

    Args:
        chosen, rejected: rewards; carry the gradient.
        margins: m, how much better the chosen one is known to be, >= 0; None for 0.
        probabilities: p, that the chosen one is the better one, in [0.5, 1], a judge's soft label; None for 1.

    Returns:
        [P]; log 2 where the two rewards are equal and the margin is 0.

    Reference: Ouyang et al. (2022), arXiv:2203.02155, Eq. 1; with a margin: Touvron et al. (2023), Llama 2,
    arXiv:2307.09288, Eq. 2; soft labels: Lee et al. (2023), RLAIF, arXiv:2309.00267, Sec. 2.2.1.
    """
    leads = at_least_float32(chosen) - at_least_float32(rejected)
    leads = leads if margins is None else leads - margins
    if probabilities is None:
        return -logsigmoid(leads)
    return -probabilities * logsigmoid(leads) - (1 - probabilities) * logsigmoid(-leads)


def reward_centring(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    """Penalty that pulls rewards to a mean of 0, which the Bradley-Terry likelihood of differences leaves free.

        loss = (r_chosen + r_rejected)^2

    Args:
        chosen, rejected: rewards; carry the gradient.

    Returns:
        [P], to be weighted; the paper's coefficient is 0.01.

    Reference: Eisenstein et al. (2023), arXiv:2312.09244, Sec. 2.
    """
    return (at_least_float32(chosen) + at_least_float32(rejected)).square()


def brier_score(leads: Float[Tensor, "P"]) -> Float[Tensor, ""]:
    """Mean squared distance of the probability of the preference from 1, in [0, 1]; 0.25 for a coin.

        brier = mean (1 - sigmoid(lead))^2

    Args:
        leads: reward of the chosen completion less that of the rejected one; P >= 1.

    Reference: Brier (1950), "Verification of forecasts expressed in terms of probability".
    """
    return torch.sigmoid(-at_least_float32(leads)).square().mean()


def calibration_error(leads: Float[Tensor, "P"], *, num_bins: int = 10) -> Float[Tensor, ""]:
    """Expected calibration error: how far confidence is from the rate of being right, in [0, 0.5].

        confidence = max(p, 1 - p),  p = sigmoid(lead);  right = [lead > 0], 1/2 for a tie
        error      = sum over bins of (pairs in the bin / P) |mean right - mean confidence|

    The bins are of equal width over [1/2, 1]. Confidence in whichever completion leads does not depend on which of the
    two is named first; the probability of the chosen one, which is always right, would.

    Args:
        leads: as for `brier_score`.
        num_bins: >= 1.

    Raises:
        ValueError: num_bins is below 1.

    Reference: Naeini et al. (2015), "Obtaining well calibrated probabilities using Bayesian binning"; Guo et al.
    (2017), arXiv:1706.04599, Eq. 3.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}, and must be at least 1; 10 is usual")
    leads = at_least_float32(leads)
    confidence = torch.sigmoid(leads.abs())
    right = (leads > 0).to(leads.dtype) + 0.5 * (leads == 0)
    bins = ((confidence - 0.5) * 2 * num_bins).long().clamp(max=num_bins - 1)
    gaps = sequence_sum(right - confidence, bins, num_sequences=num_bins)  # of each bin, its size times its gap
    return gaps.abs().sum() / len(leads)
