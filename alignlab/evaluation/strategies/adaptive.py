"""More samples for harder problems: how many, is learnt on one half of the problems and measured on the other.

Reference: Snell et al. (2024), arXiv:2408.03314, Sec. 3.2: compute-optimal scaling by predicted difficulty, with
two-fold cross validation. Difficulty is predicted here by how many of a few first samples agree.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import NamedTuple

from alignlab.evaluation.strategies.figures import Figure, estimate_of
from alignlab.evaluation.strategies.graded import GradedProblem
from alignlab.evaluation.strategies.settings import Adaptive

MIN_PROBLEMS = 4


class Curve(NamedTuple):
    """One problem's samples in one order.

    Attributes:
        level: votes of the leading answer among the first samples: the fewer, the harder.
        worth: worth of the majority of the first n samples, by n - 1.
        tokens: tokens of the first n samples, by n - 1.
    """

    level: int
    worth: list[float]
    tokens: list[int]


def adaptive(
    problems: Sequence[GradedProblem], ks: Sequence[int], settings: Adaptive, seed: int
) -> list[Figure]:
    """Return the accuracy where k samples a problem, on average, are shared out by difficulty.

    For each k >= `start`. Samples that do not raise the accuracy of the problems learnt on are not drawn.
    """
    generator = random.Random(seed)
    halves = generator.sample([row % 2 for row in range(len(problems))], len(problems))
    shuffles = [
        [curve(problem, generator.sample(range(problem.num_samples), max(ks)), settings.start) for problem in problems]
        for _ in range(settings.shuffles)
    ]
    figures = []
    for k in (k for k in ks if k >= settings.start):
        outcomes = [outcomes_of(curves, halves, settings.start, k) for curves in shuffles]
        estimates = [estimate_of([worth for worth, _ in of_problem]) for of_problem in zip(*outcomes, strict=True)]
        figures.append(Figure.of("adaptive", k, estimates, fmean(t for of_one in outcomes for _, t in of_one)))
    return figures


def curve(problem: GradedProblem, order: Sequence[int], start: int) -> Curve:
    """Return a problem's majority after each number of samples in an order."""
    votes: dict[int, list[float]] = defaultdict(list)
    worth, tokens, level, total = list[float](), list[int](), 0, 0
    for count, sample in enumerate(order, start=1):
        answer = problem.answers[sample]
        if answer is not None:
            votes[answer].append(problem.right[sample])
        total += problem.tokens[sample]
        most = max(map(len, votes.values()), default=0)
        level = most if count == start else level
        leaders = [fmean(rights) for rights in votes.values() if len(rights) == most]
        worth.append(fmean(leaders) if leaders else 0.0)
        tokens.append(total)
    return Curve(level, worth, tokens)


def allocation(curves: Sequence[Curve], start: int, k: int) -> dict[int, int]:
    """Return by level the number of samples that raises the mean accuracy most, k a problem on average.

    Each level begins with `start`; samples go where they gain most each, a step being as long as gains most.
    """
    by_level: dict[int, list[Curve]] = defaultdict(list)
    for of_problem in curves:
        by_level[of_problem.level].append(of_problem)
    means = {level: [fmean(worths) for worths in zip(*(c.worth for c in group), strict=True)]
             for level, group in by_level.items()}  # fmt: skip
    sizes = {level: len(group) for level, group in by_level.items()}
    counts, left = dict.fromkeys(sizes, start), (k - start) * len(curves)
    while True:
        step = _best_step(means, sizes, counts, left)
        if step is None:
            return counts
        level, count = step
        left -= (count - counts[level]) * sizes[level]
        counts[level] = count


def _best_step(
    means: Mapping[int, Sequence[float]], sizes: Mapping[int, int], counts: Mapping[int, int], left: int
) -> tuple[int, int] | None:
    """Return the level and its number of samples that gain most accuracy a sample; None where nothing gains."""
    steps = [
        ((of_level[count - 1] - of_level[counts[level] - 1]) / (count - counts[level]), level, count)
        for level, of_level in means.items()
        for count in range(counts[level] + 1, len(of_level) + 1)
        if (count - counts[level]) * sizes[level] <= left
    ]
    gain, level, count = max(steps, default=(0.0, 0, 0))
    return (level, count) if gain > 1e-12 else None


def outcomes_of(
    curves: Sequence[Curve], halves: Sequence[int], start: int, k: int
) -> list[tuple[float, int]]:
    """Return (worth, tokens) of each problem under the allocation learnt on the other half."""
    learnt = [
        allocation([c for c, half in zip(curves, halves, strict=True) if half != own], start, k) for own in (0, 1)
    ]
    outcomes = []
    for of_problem, half in zip(curves, halves, strict=True):
        count = learnt[half].get(of_problem.level, k)  # a level that the other half lacks gets its even share
        outcomes.append((of_problem.worth[count - 1], of_problem.tokens[count - 1]))
    return outcomes
