"""Confidence intervals of one figure over problems, documents or windows."""

from collections.abc import Iterator, Sequence
from math import sqrt
from statistics import NormalDist

import torch
from torch import Tensor

_DRAWN_TOGETHER = 256


def wilson_interval(fraction: float, num_items: int, *, level: float = 0.95) -> tuple[float, float]:
    """Interval of a fraction of items, also near 0 and 1 and of few items.

        centre = (p + z^2 / 2n) / (1 + z^2 / n),  half = z / (1 + z^2 / n) sqrt(p (1 - p) / n + z^2 / 4n^2)

    Of a mean of values in [0, 1] that are not all 0 or 1 it is wider than it need be.

    Args:
        fraction: p, in [0, 1].
        num_items: n >= 1.
        level: coverage, in (0, 1); z is the normal quantile of (1 + level) / 2.

    Returns:
        (low, high), in [0, 1].

    Reference: Wilson (1927), "Probable inference, the law of succession, and statistical inference", JASA 22(158).
    """
    check_level(level)
    if num_items < 1 or not 0 <= fraction <= 1:
        raise ValueError(f"fraction is {fraction} of {num_items} items, and must be in [0, 1] of at least 1")
    z = NormalDist().inv_cdf((1 + level) / 2)
    shrink = 1 + z * z / num_items
    centre = (fraction + z * z / (2 * num_items)) / shrink
    half = z / shrink * sqrt(fraction * (1 - fraction) / num_items + z * z / (4 * num_items**2))
    # The exact bound at 0 or 1, where rounding would leave it just inside.
    return (0.0 if fraction == 0 else centre - half), (1.0 if fraction == 1 else centre + half)


def mean_interval(values: Sequence[float], *, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Interval of a mean over problems of values in [0, 1]: the bootstrap's; of equal values Wilson's.

    Equal values give a bootstrap no width, however few they are.

    Args:
        values: one a problem, each in [0, 1]; not empty.
        level, seed: see `ratio_interval`.
    """
    if not values:
        raise ValueError("values is empty, and must hold at least 1; give one a problem")
    if min(values) == max(values):
        return wilson_interval(values[0], len(values), level=level)
    return ratio_interval(values, [1.0] * len(values), level=level, seed=seed)


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], *, num_resamples: int = 2000, level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of sum(numerators) / sum(denominators), by resampling the items: the percentile bootstrap.

    Args:
        numerators, denominators: one each an item, such as the nats and the tokens of a document; at least one item,
            and denominators of at least 0, not all 0.
        num_resamples: >= 1.
        level: coverage, in (0, 1).
        seed: of the resampling; the same gives the same bounds.

    Returns:
        (low, high): the percentiles (1 - level) / 2 and (1 + level) / 2; infinity where too many resamples have
        denominators of 0 alone.

    Reference: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", ch. 13.
    """
    check_level(level)
    if not numerators or min(denominators) < 0 or sum(denominators) == 0:
        raise ValueError("there must be at least one item, and denominators must be at least 0, not all 0")
    above = torch.tensor(numerators, dtype=torch.float64)
    below = torch.tensor(denominators, dtype=torch.float64)
    ratios: list[float] = []
    for drawn in resampled(len(above), num_resamples, seed=seed):
        sums = below[drawn].sum(1)
        ratios += torch.where(sums > 0, above[drawn].sum(1) / sums, torch.inf).tolist()
    return _percentiles(ratios, level)


def difference_interval(
    first: Sequence[float], second: Sequence[float], *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of mean(first) - mean(second) of two groups of other items, each resampled by itself.

    Args:
        first, second: one value an item; neither is empty.
        num_resamples, level, seed: see `ratio_interval`.

    Reference: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", ch. 8.3, with its percentiles.
    """
    check_level(level)
    if not first or not second:
        raise ValueError("first and second must hold at least one item each, or there is no difference")
    means: list[Tensor] = []
    for number, values in enumerate((first, second)):
        group = torch.tensor(values, dtype=torch.float64)
        draws = resampled(len(group), num_resamples, seed=2 * seed + number)
        means.append(torch.cat([group[drawn].mean(1) for drawn in draws]))
    return _percentiles((means[0] - means[1]).tolist(), level)


def resampled(num_items: int, num_resamples: int, *, seed: int) -> Iterator[Tensor]:
    """Yield the indices of resamples with replacement, [some resamples, num_items] int64, `num_resamples` in all.

    Args:
        seed: the same gives the same indices.
    """
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, num_resamples, _DRAWN_TOGETHER):
        size = min(_DRAWN_TOGETHER, num_resamples - start), num_items
        yield torch.randint(num_items, size, generator=generator)


def _percentiles(figures: Sequence[float], level: float) -> tuple[float, float]:
    """Return the percentiles (1 - level) / 2 and (1 + level) / 2 of the figures of resamples."""
    ordered = sorted(figures)
    cut = int(len(ordered) * (1 - level) / 2)
    return ordered[cut], ordered[-1 - cut]


def check_level(level: float) -> None:
    """Raise if a coverage is no probability between 0 and 1.

    Raises:
        ValueError: it is not.
    """
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, and must lie between 0 and 1; 0.95 is usual")
