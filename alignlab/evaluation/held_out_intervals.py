"""95 % intervals of what trainers measure on held-out pairs, labels and completions, over these.

A single pair or completion says nothing about a mean that has no bounds: its interval is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isfinite

import torch

from alignlab.evaluation.accuracy_intervals import accuracy_intervals
from alignlab.evaluation.results import Evaluation, EvaluationResult, Intervals, perplexity_of
from alignlab.functional.calibration import error_interval
from alignlab.functional.intervals import (
    difference_interval,
    mean_interval,
    ratio_interval,
    resampled,
    wilson_interval,
)
from alignlab.functional.reward_losses import calibration_error

_ERROR_RESAMPLES = 500
"""Of a calibration error, which is computed resample by resample; a standard deviation needs few."""


def intervals_of(result: Evaluation) -> Intervals:
    """Return the intervals of a result of any kind by the names of its figures."""
    return accuracy_intervals(result) if isinstance(result, EvaluationResult) else result.intervals


def agreement_intervals(agrees: Sequence[float], means: Mapping[str, Sequence[float]]) -> Intervals:
    """Return the intervals of "accuracy", Wilson's, and of other means, the bootstrap's.

    Args:
        agrees: of each item 1, 0, or 1/2 for a tie; not empty.
        means: values of each item, by the name of their mean.
    """
    count = len(agrees)
    bounds = {"accuracy": wilson_interval(sum(agrees) / count, count)}
    if count > 1:
        bounds |= {name: ratio_interval(values, [1.0] * count) for name, values in means.items()}
    return bounds


def label_intervals(
    agrees: Sequence[float], rewards: Sequence[float], desirable: Sequence[bool], losses: Sequence[float]
) -> Intervals:
    """Return the intervals of the figures of a `LabelResult`, with the reference point as it is.

    Args:
        agrees: of each completion 1, 0, or 1/2 for a tie; not empty.
        rewards, desirable, losses: of each completion.
    """
    bounds = dict(agreement_intervals(agrees, {"loss": losses}))
    good, bad = (
        [reward for reward, is_good in zip(rewards, desirable, strict=True) if is_good == side]
        for side in (True, False)
    )
    if min(len(good), len(bad)) > 1:
        bounds["margin"] = difference_interval(good, bad)
    return bounds


def probability_intervals(leads: Sequence[float]) -> Intervals:
    """Return the intervals of "calibration_error" and "brier" of a reward model's probabilities.

    Args:
        leads: reward of the chosen completion of each pair less that of the rejected one; not empty.
    """
    values = torch.tensor(leads)
    bounds = {"brier": mean_interval(torch.sigmoid(-values).square().tolist())}
    if len(leads) > 1:
        draws = torch.cat(list(resampled(len(leads), _ERROR_RESAMPLES, seed=0)))
        errors = [float(calibration_error(values[drawn])) for drawn in draws]
        bounds["calibration_error"] = error_interval(float(calibration_error(values)), errors)
    return bounds


def likelihood_intervals(nats: Sequence[float], tokens: Sequence[float]) -> Intervals:
    """Return the intervals of "loss", nats a token, and of "perplexity", where they are finite.

    Args:
        nats, tokens: sum of -log p of each completion, and its number of tokens.
    """
    if len(nats) < 2:
        return {}
    low, high = ratio_interval(nats, [float(count) for count in tokens])
    bounds = {"loss": (low, high), "perplexity": (perplexity_of(low), perplexity_of(high))}
    return {name: of_figure for name, of_figure in bounds.items() if isfinite(of_figure[1])}
