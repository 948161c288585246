"""The strategies of one model's pool, measured; and models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from alignlab.errors import ConfigError
from alignlab.evaluation.strategies.adaptive import MIN_PROBLEMS, adaptive
from alignlab.evaluation.strategies.calibrated import Calibration, calibrate_votes, check_halves
from alignlab.evaluation.strategies.confidence import confidence
from alignlab.evaluation.strategies.figures import Figure
from alignlab.evaluation.strategies.graded import GradedProblem
from alignlab.evaluation.strategies.settings import (
    Adaptive,
    BestOfN,
    Calibrated,
    Confidence,
    Majority,
    Strategy,
    Weighted,
    name_of,
)
from alignlab.evaluation.strategies.voting import best_of_n, majority, oracle, weighted


@dataclass(frozen=True)
class MeasuredStrategies:
    """One model's figures.

    Attributes:
        name: of the model.
        figures: of all strategies, the oracle's first.
        problems: the graded problems that they are computed from.
        calibrations: of the strategies `calibrated`.
    """

    name: str
    figures: tuple[Figure, ...]
    problems: tuple[GradedProblem, ...] = field(repr=False)
    calibrations: tuple[Calibration, ...] = ()

    def of(self, strategy: str) -> list[Figure]:
        """Return the figures of one strategy."""
        return [figure for figure in self.figures if figure.strategy == strategy]

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON."""
        calibrations = [calibration.to_json() for calibration in self.calibrations]
        return {"name": self.name, "figures": [figure.to_json() for figure in self.figures]} | (
            {"calibration": calibrations} if calibrations else {}
        )


def powers_of_two(num_samples: int) -> tuple[int, ...]:
    """Return 1, 2, 4, ... and the pool's size."""
    return (*(2**i for i in range(num_samples.bit_length()) if 2**i < num_samples), num_samples)


def check_samples(strategies: Sequence[Strategy], ks: Sequence[int], *, num_samples: int) -> None:
    """Raise if a pool of this size is too small for a strategy.

    Raises:
        ConfigError: a k is over the pool's size, or too small for where a strategy begins.
    """
    out_of_range = [k for k in ks if not 1 <= k <= num_samples]
    if out_of_range:
        raise ConfigError(
            f"--pass-at holds {out_of_range[0]}, and each k must be from 1 to the pool's {num_samples} samples; raise "
            "--num-samples, or lower k"
        )
    for strategy in strategies:
        first = strategy.start if isinstance(strategy, Adaptive) else 1
        if max(ks) < first:
            raise ConfigError(
                f"--strategy adaptive: start is {first}, and must be at most the largest k ({max(ks)}); lower it, or "
                "raise --num-samples"
            )


def check_problems(strategies: Sequence[Strategy], num_problems: int) -> None:
    """Raise if a strategy that learns on a part of the problems has too few.

    Raises:
        ConfigError: with the number that it needs.
    """
    for strategy in strategies:
        if isinstance(strategy, Adaptive) and num_problems < MIN_PROBLEMS:
            raise ConfigError(
                f"--strategy {name_of(strategy)} learns on one half of the problems and is measured on the other, and "
                f"needs at least {MIN_PROBLEMS}, not {num_problems}; give more"
            )
        if isinstance(strategy, Calibrated):
            check_halves(strategy, num_problems)


def measure_strategies(
    name: str, problems: Sequence[GradedProblem], strategies: Sequence[Strategy], ks: Sequence[int], *, seed: int
) -> MeasuredStrategies:
    """Return the figures of the strategies that a pool is enough for; nothing is sampled.

    Args:
        name: of the model.
        problems: the graded pool, with answers read and rewards scored as the strategies need.
        strategies: those that sample by themselves (budget, augment) are left out.
        ks: numbers of samples.
        seed: of random subsets and orders.
    """
    check_samples(strategies, ks, num_samples=problems[0].num_samples)
    check_problems(strategies, len(problems))
    figures = oracle(problems, ks)
    calibrations = []
    for strategy in strategies:
        if isinstance(strategy, Majority):
            figures += majority(problems, ks)
        elif isinstance(strategy, BestOfN):
            figures += best_of_n(problems, ks, strategy.reward)
        elif isinstance(strategy, Weighted):
            figures += weighted(problems, ks, strategy, seed)
        elif isinstance(strategy, Confidence):
            figures += confidence(problems, ks, strategy, seed)
        elif isinstance(strategy, Adaptive):
            figures += adaptive(problems, ks, strategy, seed)
        elif isinstance(strategy, Calibrated):
            calibrations.append(calibrate_votes(problems, strategy, seed))
    return MeasuredStrategies(name, tuple(figures), tuple(problems), tuple(calibrations))
