"""The share of votes as a confidence, calibrated by a temperature that is fitted on held-out problems."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignlab.errors import ConfigError
from alignlab.evaluation.strategies.figures import DIGITS
from alignlab.evaluation.strategies.graded import GradedProblem
from alignlab.evaluation.strategies.settings import Calibrated
from alignlab.functional.calibration import (
    Bin,
    error_interval,
    expected_calibration_error,
    fit_temperature,
    reliability,
)

NUM_RESAMPLES = 500
MIN_HALF = 2


@dataclass(frozen=True)
class CalibrationError:
    """An expected calibration error, its 95 % interval over problems, and the bins of the reliability diagram."""

    value: float
    low: float
    high: float
    bins: tuple[Bin, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the numbers, and the bins that are not empty."""
        rows = [
            {"low": b.low, "high": b.high, "size": b.size, "confidence": round(b.confidence, DIGITS),
             "right": round(b.right, DIGITS)}
            for b in self.bins if b.size
        ]  # fmt: skip
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {**{name: round(number, DIGITS) for name, number in numbers.items()}, "bins": rows}


@dataclass(frozen=True)
class Calibration:
    """A temperature, and the errors on other data than it was fitted on.

    Attributes:
        temperature: that divides the log-probs.
        num_fitted, num_measured: problems (or tokens) of either part.
        before, after: errors without the temperature, and with it.
    """

    temperature: float
    num_fitted: int
    num_measured: int
    before: CalibrationError
    after: CalibrationError

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as JSON."""
        return {
            "temperature": round(self.temperature, DIGITS), "num_fitted": self.num_fitted,
            "num_measured": self.num_measured, "error_before": self.before.to_json(),
            "error_after": self.after.to_json(),
        }  # fmt: skip


def check_halves(settings: Calibrated, num_problems: int) -> None:
    """Raise if there are no problems to fit or to measure on.

    Raises:
        ConfigError: one of the two parts has fewer than two problems.
    """
    num_fitted = round(settings.held_out_frac * num_problems)
    smaller = min(num_fitted, num_problems - num_fitted)
    if smaller < MIN_HALF:
        raise ConfigError(
            f"--strategy calibrated: held_out_frac is {settings.held_out_frac}, and must leave at least {MIN_HALF} of "
            f"{num_problems} problems to fit the temperature on and {MIN_HALF} to measure the error on; give more "
            "problems, or another fraction"
        )


def calibrate_votes(problems: Sequence[GradedProblem], settings: Calibrated, seed: int) -> Calibration:
    """Fit the temperature of the shares of votes on some problems, and measure the errors on the others.

    The confidence is the probability of the leading answer, see `vote_logits`.
    """
    check_halves(settings, len(problems))
    order = random.Random(seed).sample(range(len(problems)), len(problems))
    num_fitted = round(settings.held_out_frac * len(problems))
    width = max(len(problem.votes()) for problem in problems) + 1
    fitted, measured = (
        [vote_logits(problems[row], width) for row in rows] for rows in (order[:num_fitted], order[num_fitted:])
    )
    fitted_logits, worths = map(torch.stack, zip(*fitted, strict=True))
    temperature = fit_temperature(fitted_logits, worths / worths.sum(dim=1, keepdim=True))
    logits, worths = map(torch.stack, zip(*measured, strict=True))
    leading = logits[:, :-1].argmax(dim=1, keepdim=True)  # of several, the first to appear
    right = worths.gather(1, leading)[:, 0]
    before, after = (
        calibration_error(torch.softmax(logits / by, dim=1).gather(1, leading)[:, 0], right, settings.bins, seed)
        for by in (1.0, temperature)
    )
    return Calibration(temperature, len(fitted), len(measured), before, after)


def vote_logits(problem: GradedProblem, width: int) -> tuple[Tensor, Tensor]:
    """Return the log of each answer's votes, and the answer's worth, both [width].

    The last place stands for all that no sample says. Its votes are the samples without an answer, and a half; it is
    worth 1 where no sample is right.
    """
    logits = torch.full((width,), -math.inf, dtype=torch.float64)
    worths = torch.zeros(width, dtype=torch.float64)
    for place, (count, worth) in enumerate(problem.votes()):
        logits[place], worths[place] = math.log(count), worth
    logits[-1] = math.log(problem.answers.count(None) + 0.5)
    worths[-1] = max(0.0, 1 - float(worths.sum()))
    return logits, worths


def calibration_error(confidence: Tensor, right: Tensor, num_bins: int, seed: int) -> CalibrationError:
    """Return the expected calibration error with its bootstrap interval over the items."""
    bins = reliability(confidence, right, num_bins=num_bins)
    generator, n = torch.Generator().manual_seed(seed), len(confidence)
    errors = []
    for _ in range(NUM_RESAMPLES):
        drawn = torch.randint(n, (n,), generator=generator)
        errors.append(expected_calibration_error(reliability(confidence[drawn], right[drawn], num_bins=num_bins)))
    error = expected_calibration_error(bins)
    return CalibrationError(error, *error_interval(error, errors), tuple(bins))

