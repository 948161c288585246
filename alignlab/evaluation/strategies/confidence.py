"""Confidence-weighted votes with early stop, replayed on a pool.

Reference: Fu et al. (2025), DeepConf, arXiv:2508.15260, Sec. 3 and Alg. 2. The paper's confidence of a token is the
negative mean log-prob of the likeliest tokens there, which is large where one of them has nearly all the probability.
Engines report the log-prob of the sampled token alone, and that is used here.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate
from math import ceil, exp, inf
from statistics import fmean

from alignlab.evaluation.strategies.figures import Figure, estimate_of
from alignlab.evaluation.strategies.graded import GradedProblem
from alignlab.evaluation.strategies.settings import Confidence
from alignlab.evaluation.strategies.voting import weighted_value

SHUFFLES = 32
"""Random orders of the pool, each a replay of sampling, that the figures are the means of."""


def window_means(logprobs: Sequence[float], window: int) -> list[float]:
    """Return the mean log-prob of each window of consecutive tokens; of a shorter sample, that of all its tokens."""
    width = min(window, len(logprobs))
    if width == 0:
        return [-inf]
    sums = [0.0, *accumulate(logprobs)]
    return [(sums[end] - sums[end - width]) / width for end in range(width, len(sums))]


def stopped_at(logprobs: Sequence[float], window: int, threshold: float) -> int | None:
    """Return the number of tokens up to the first window below a threshold; None for a sample that ends by itself."""
    means = window_means(logprobs, window)
    width = min(window, len(logprobs))
    return next((width + start for start, mean in enumerate(means) if mean < threshold), None)


def threshold_of(lowest: Sequence[float], keep_frac: float) -> float:
    """Return the threshold that a fraction of samples keep to: the confidence of the last of them, surest first."""
    return sorted(lowest, reverse=True)[ceil(keep_frac * len(lowest)) - 1]


def confidence(
    problems: Sequence[GradedProblem], ks: Sequence[int], settings: Confidence, seed: int
) -> list[Figure]:
    """Return the accuracy and the tokens of sampling at most k completions of a problem.

    The first `warmup` samples are drawn whole; the threshold is the least sure window that `keep_frac` of them keep to.
    A later sample is stopped at its first window below the threshold, and does not vote. Each other sample votes with
    exp(mean log-prob of its least sure window). From the first samples on, sampling ends once an answer has the
    share `consensus` of the weights.
    """
    generator = random.Random(seed)
    replays = [
        [replay(problem, generator.sample(range(problem.num_samples), max(ks)), settings) for _ in range(SHUFFLES)]
        for problem in problems
    ]
    figures = []
    for k in ks:
        estimates = [estimate_of([outcomes[k - 1][0] for outcomes in of_problem]) for of_problem in replays]
        tokens = fmean(fmean(outcomes[k - 1][1] for outcomes in of_problem) for of_problem in replays)
        figures.append(Figure.of("confidence", k, estimates, tokens))
    return figures


def replay(problem: GradedProblem, order: Sequence[int], settings: Confidence) -> list[tuple[float, int]]:
    """Return (worth of the answer, tokens) after each number of samples of an order."""
    lowest = [min(window_means(problem.logprobs[sample], settings.window)) for sample in order]
    threshold = threshold_of(lowest[: settings.warmup], settings.keep_frac)
    voters: list[int] = []
    weights: list[float] = []
    tokens, outcomes = 0, list[tuple[float, int]]()
    for count, (sample, least) in enumerate(zip(order, lowest, strict=True), start=1):
        cut = None
        if count > settings.warmup:
            cut = stopped_at(problem.logprobs[sample], settings.window, threshold)
        tokens += problem.tokens[sample] if cut is None else cut
        if cut is None:
            voters.append(sample)
            weights.append(exp(least))
        outcomes.append((weighted_value(problem, voters, weights), tokens))
        if count >= settings.warmup and _leading_share(problem, voters, weights) >= settings.consensus:
            break
    return outcomes + outcomes[-1:] * (len(order) - len(outcomes))


def _leading_share(problem: GradedProblem, voters: Sequence[int], weights: Sequence[float]) -> float:
    """Return the largest answer's share of the weights; 0 without votes."""
    sums: dict[int, float] = defaultdict(float)
    for sample, weight in zip(voters, weights, strict=True):
        answer = problem.answers[sample]
        if answer is not None:
            sums[answer] += weight
    total = sum(sums.values())
    return max(sums.values()) / total if total > 0 else 0.0
