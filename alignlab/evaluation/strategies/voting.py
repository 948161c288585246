"""Strategies over subsets of a pool: the oracle, best-of-n, majority and weighted votes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean

from alignlab.errors import RewardError
from alignlab.evaluation.strategies.figures import Estimate, Figure, over_subsets
from alignlab.evaluation.strategies.graded import GradedProblem
from alignlab.evaluation.strategies.settings import LOGPROB, Weighted
from alignlab.functional.estimation import pass_at_k
from alignlab.functional.scaling import best_at_k, majority_at_k

ORACLE = "oracle"
_MAX_SCORE = 500.0  # of a sigmoid; beyond it the exponential overflows


def oracle(problems: Sequence[GradedProblem], ks: Sequence[int]) -> list[Figure]:
    """Return pass@k: the accuracy of one who would know which of k samples is right."""
    return [
        Figure.of(
            ORACLE, k, [Estimate(pass_at_k(p.num_samples, int(sum(p.right)), k)) for p in problems],
            tokens_of(problems, k),
        )
        for k in ks
    ]  # fmt: skip


def majority(problems: Sequence[GradedProblem], ks: Sequence[int]) -> list[Figure]:
    """Return maj@k, exactly."""
    curves = [majority_curve(problem, max(ks)) for problem in problems]
    return [
        Figure.of("majority", k, [Estimate(curve[k - 1]) for curve in curves], tokens_of(problems, k)) for k in ks
    ]


def majority_curve(problem: GradedProblem, max_k: int) -> list[float]:
    """Return a problem's maj@k for k from 1 to max_k."""
    votes = problem.votes()
    num_silent = problem.answers.count(None)
    counts, values = [count for count, _ in votes], [value for _, value in votes]
    curve: list[float] = majority_at_k(counts, values, num_silent=num_silent, max_k=max_k).tolist()
    return curve


def best_of_n(problems: Sequence[GradedProblem], ks: Sequence[int], reward: str) -> list[Figure]:
    """Return bon@k by a reward's scores, exactly."""
    return [
        Figure.of(
            f"best_of_n {reward}", k, [Estimate(best_at_k(p.scores[reward], p.right, k)) for p in problems],
            tokens_of(problems, k),
        )
        for k in ks
    ]  # fmt: skip


def weighted(problems: Sequence[GradedProblem], ks: Sequence[int], settings: Weighted, seed: int) -> list[Figure]:
    """Return the accuracy of votes weighted by a reward or by mean log-probs, over subsets of the pool.

    Raises:
        RewardError: a reward that is a weight as it is has a value below 0.
    """

    def estimate(problem: GradedProblem, k: int) -> Estimate:
        weights = weights_of(problem, settings)
        return over_subsets(
            problem.num_samples, k, lambda subset: weighted_value(problem, subset, [weights[i] for i in subset]),
            seed=seed,
        )

    name = f"weighted {settings.weight}"
    return [Figure.of(name, k, [estimate(problem, k) for problem in problems], tokens_of(problems, k)) for k in ks]


def weights_of(problem: GradedProblem, settings: Weighted) -> list[float]:
    """Return the weight of each sample's vote; 0 for one without a score.

    Raises:
        RewardError: see `weighted`.
    """
    scores = problem.scores[settings.weight]
    if settings.weight == LOGPROB:
        return [math.exp(score) for score in scores]
    if settings.link == "sigmoid":
        return [1 / (1 + math.exp(-max(score, -_MAX_SCORE))) if score > -math.inf else 0.0 for score in scores]
    negative = next((score for score in scores if -math.inf < score < 0), None)
    if negative is not None:
        raise RewardError(
            f"a weight of votes must be at least 0, and the reward {settings.weight} gave {negative:g}; use "
            f"--strategy weighted:weight={settings.weight},link=sigmoid, or best_of_n"
        )
    return [max(0.0, score) for score in scores]


def weighted_value(problem: GradedProblem, samples: Sequence[int], weights: Sequence[float]) -> float:
    """Return the worth of the answer with the largest sum of weights; the mean of those that are equal, 0 without any.

    Args:
        samples: those that vote.
        weights: of these samples, >= 0.
    """
    sums: dict[int, float] = defaultdict(float)
    rights: dict[int, list[float]] = defaultdict(list)
    for sample, of_sample in zip(samples, weights, strict=True):
        answer = problem.answers[sample]
        if answer is not None:
            sums[answer] += of_sample
            rights[answer].append(problem.right[sample])
    if not sums:
        return 0.0
    largest = max(sums.values())
    leaders = [answer for answer, total in sums.items() if math.isclose(total, largest, rel_tol=1e-12)]
    return fmean(fmean(rights[answer]) for answer in leaders)


def tokens_of(problems: Sequence[GradedProblem], k: int) -> float:
    """Return the mean number of tokens of k samples of a problem; the prompt is computed once, and not counted."""
    return k * fmean(fmean(problem.tokens) for problem in problems)
