"""Calibration: whether a confidence is the rate of being right; and the temperature that brings it nearer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0
_BISECTIONS = 60


class Bin(NamedTuple):
    """Confidences of one interval of equal width.

    Attributes:
        low, high: its bounds; the last one includes 1.
        count: number of confidences in it.
        confidence, right: their means; 0 where there are none.
    """

    low: float
    high: float
    count: int
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
    total = sum(of_bin.count for of_bin in bins)
    if total == 0:
        raise ValueError("the bins hold no confidence, and must hold at least 1; give some")
    return sum(of_bin.count * abs(of_bin.right - of_bin.confidence) for of_bin in bins) / total


def fit_temperature(logits: Float[Tensor, "N"], right: Float[Tensor, "N"]) -> float:
    """Return the temperature T > 0 that makes what was right likeliest.

        minimise over T: -sum right log sigmoid(z / T) + (1 - right) log sigmoid(-z / T)

    In 1 / T the loss is convex: its slope, sum (sigmoid(z / T) - right) z, is brought to 0 by bisection.

    Args:
        logits: log(confidence / (1 - confidence)), finite; N >= 1.
        right: see `reliability`.

    Returns:
        Between `MIN_TEMPERATURE` and `MAX_TEMPERATURE`; one of the two where the loss falls beyond it, such as where
        confidence says nothing about being right.

    Reference: Guo et al. (2017), arXiv:1706.04599, Sec. 4.2.
    """
    if not len(logits):
        raise ValueError("there are no logits to calibrate on, and must be at least 1; give held-out data")
    z, y = logits.double(), right.double()
    low, high = 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(_BISECTIONS):
        middle = (low * high) ** 0.5
        slope = float(((torch.sigmoid(z * middle) - y) * z).sum())
        low, high = (middle, high) if slope < 0 else (low, middle)
    return 1 / (low * high) ** 0.5
