"""Figures of strategies: the accuracy over problems with its interval, against the tokens that it cost."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any, NamedTuple

from alignlab.functional.intervals import mean_interval

DIGITS = 4
MAX_SUBSETS = 256
"""Subsets of a pool that a figure without a closed form is the mean over; all of them, where there are no more."""


class Estimate(NamedTuple):
    """A value of one problem, and the variance of its estimate; 0 for an exact one."""

    value: float
    variance: float = 0.0


@dataclass(frozen=True)
class Figure:
    """One strategy at one cost.

    Attributes:
        strategy: its name.
        k: samples of a problem, or tokens of thinking for `budget`.
        values: expected accuracy of each problem.
        tokens: mean number of tokens that are sampled for a problem.
        error: standard error of the accuracy from the random choice of subsets; 0 where it is exact.
    """

    strategy: str
    k: int
    values: tuple[float, ...]
    tokens: float
    error: float = 0.0

    @classmethod
    def of(cls, strategy: str, k: int, estimates: Sequence[Estimate], tokens: float) -> Figure:
        """Return the figure of all problems' estimates."""
        error = math.sqrt(sum(estimate.variance for estimate in estimates)) / len(estimates)
        return cls(strategy, k, tuple(estimate.value for estimate in estimates), tokens, error)

    @property
    def accuracy(self) -> float:
        """Mean over the problems."""
        return fmean(self.values)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval over the problems."""
        return mean_interval([min(1.0, max(0.0, value)) for value in self.values])

    def to_json(self) -> dict[str, Any]:
        """Return the figure's rounded numbers, by name."""
        low, high = self.interval
        return {
            "strategy": self.strategy, "k": self.k, "accuracy": round(self.accuracy, DIGITS),
            "low": round(low, DIGITS), "high": round(high, DIGITS), "tokens": round(self.tokens, 1),
            "error": round(self.error, DIGITS),
        }  # fmt: skip


def over_subsets(n: int, k: int, value: Callable[[tuple[int, ...]], float], *, seed: int) -> Estimate:
    """Return the mean value of all subsets of k of n samples, or of `MAX_SUBSETS` random ones if there are more."""
    if math.comb(n, k) <= MAX_SUBSETS:
        return Estimate(fmean(value(subset) for subset in itertools.combinations(range(n), k)))
    generator = random.Random(seed)
    return estimate_of([value(tuple(generator.sample(range(n), k))) for _ in range(MAX_SUBSETS)])


def estimate_of(values: Sequence[float]) -> Estimate:
    """Return the mean of independent values, with the variance of the mean; of one value the variance is unknown, 0."""
    return Estimate(fmean(values), variance(values) / len(values) if len(values) > 1 else 0.0)
