"""Calibration: whether a confidence is the rate of being right; and the temperature that brings it nearer."""

from collections.abc import Callable, Sequence
from math import exp, log
from statistics import NormalDist, stdev
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
_MAX_EVALUATIONS, _TOLERANCE = 60, 1e-5


class Bin(NamedTuple):
    """Confidences of one interval of equal width.

    Attributes:
        low, high: its bounds; the last one includes 1.
        size: number of confidences in it.
        confidence, right: their means; 0 where there are none.
    """

    low: float
    high: float
    size: int
    confidence: float
    right: float


def reliability(
    confidence: Float[Tensor, "N"], right: Float[Tensor, "N"], *, num_bins: int = 10
) -> list[Bin]:
    """Return the bins of a reliability diagram.

    Args:
        confidence: in [0, 1].
        right: 1 where the prediction is right, 0 where it is wrong, or a chance of it.
        num_bins: bins of equal width over [0, 1], >= 1.

    Reference: DeGroot and Fienberg (1983); Guo et al. (2017), arXiv:1706.04599, Sec. 2.
    """
    if num_bins < 1:
        raise ValueError(f"num_bins is {num_bins}, and must be at least 1; 10 is usual")
    places = (confidence.double() * num_bins).long().clamp(0, num_bins - 1)
    counts = torch.bincount(places, minlength=num_bins)
    sums = [torch.bincount(places, values.double(), minlength=num_bins) for values in (confidence, right)]
    means = [(total / counts.clamp(min=1)).tolist() for total in sums]
    return [
        Bin(i / num_bins, (i + 1) / num_bins, int(counts[i]), means[0][i], means[1][i]) for i in range(num_bins)
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Mean distance of confidence and rate of being right, over the bins, each by its count; in [0, 1].

        ECE = sum over bins (count / N) |right - confidence|

    Args:
        bins: of `reliability`, with at least one confidence in them.

    Reference: Guo et al. (2017), arXiv:1706.04599, Eq. 3.
    """
    total = sum(of_bin.size for of_bin in bins)
    if total == 0:
        raise ValueError("the bins hold no confidence, and must hold at least 1; give some")
    return sum(of_bin.size * abs(of_bin.right - of_bin.confidence) for of_bin in bins) / total


def error_interval(error: float, resampled: Sequence[float], *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a calibration error, from its values on resampled items.

    The error of a resample is larger on average, by the noise in each bin, so that percentiles may leave the error
    itself out. The interval is the normal one, error +- z times the standard deviation over resamples, within [0, 1].

    Args:
        error: of all items.
        resampled: errors of at least two resamples.
        level: coverage, in (0, 1); z is the normal quantile of (1 + level) / 2.
    """
    half = NormalDist().inv_cdf((1 + level) / 2) * stdev(resampled)
    return max(0.0, error - half), min(1.0, error + half)


def fit_temperature(logits: Float[Tensor, "N C"], targets: Float[Tensor, "N C"]) -> float:
    """Return the temperature T > 0 that makes what was right likeliest.

        minimise over T: -sum over n, c of targets_nc log softmax(z_n / T)_c

    Args:
        logits: z, unnormalised log-probs of C classes; -inf for a class that an item does not have.
        targets: probabilities of the right class, such as 1 for it; each row sums to 1. N >= 1.

    Returns:
        See `solve_temperature`.

    Reference: Guo et al. (2017), arXiv:1706.04599, Sec. 4.2, Eq. 9.
    """
    if not len(logits):
        raise ValueError("there are no logits to calibrate on, and must be at least 1; give held-out data")
    has_class = logits > -torch.inf
    z = logits.double().where(has_class, 0.0)
    right = (targets.double() * z).sum()

    def slope(inverse: float) -> float:
        probabilities = torch.softmax((z * inverse).where(has_class, -torch.inf), dim=1)
        return float((probabilities * z).sum() - right)

    return solve_temperature(slope)


def solve_temperature(slope: Callable[[float], float]) -> float:
    """Return the temperature at which the loss of `fit_temperature` is smallest, to a relative 1e-4.

    In b = 1 / T the loss is convex. Its slope, sum over n of (mean of z under softmax(b z) - z of the right class), is
    brought to 0 by false position in log b (the Illinois rule), which needs few evaluations.

    Args:
        slope: of the loss by b, at b.

    Returns:
        Between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`; one of the two where the loss falls beyond it, such as where
        all that was likeliest was right.
    """
    low, high = -log(MAX_TEMPERATURE), -log(MIN_TEMPERATURE)
    at_low, at_high = slope(exp(low)), slope(exp(high))
    if at_low >= 0 or at_high <= 0:
        return MAX_TEMPERATURE if at_low >= 0 else MIN_TEMPERATURE
    last = 0
    for _ in range(_MAX_EVALUATIONS):
        middle = low - at_low * (high - low) / (at_high - at_low)
        if not low < middle < high:
            break
        at_middle = slope(exp(middle))
        if at_middle == 0 or high - low < _TOLERANCE:
            break
        # The end that stays twice counts half, or it would stay for ever.
        if at_middle < 0:
            low, at_low, at_high, last = middle, at_middle, at_high / (2 if last < 0 else 1), -1
        else:
            high, at_high, at_low, last = middle, at_middle, at_low / (2 if last > 0 else 1), 1
    return exp(-middle)
