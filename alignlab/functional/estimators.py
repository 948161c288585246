"""Estimates from repeated samples, and of differences between two policies on the same problems."""

import random
from collections.abc import Sequence
from math import comb, exp, fsum, lgamma, log
from statistics import fmean

_BISECTIONS = 60  # halvings of [0, 1]: below the spacing of floats near any bound that matters


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the probability that at least one of k samples is correct.

        1 - C(n - c, k) / C(n, k)        n = num_samples, c = num_correct

    Args:
        num_samples: samples drawn of one problem.
        num_correct: how many were correct, 0..num_samples.
        k: 1..num_samples.

    Reference: Chen et al. (2021), arXiv:2107.03374, Eq. 1.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}, and must lie between 1 and num_samples ({num_samples}); draw more samples")
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct is {num_correct}, and must lie between 0 and num_samples ({num_samples})")
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def mcnemar_exact(num_gained: int, num_lost: int) -> float:
    """Two-sided p-value of the exact McNemar test: were gains and losses equally likely?

    Of two policies on the same problems, only those count that one answers right and the other wrong. Where neither is
    better, gains are Binomial(n, 1/2).

        p = min(1, 2 P(X <= min(gained, lost))),  X ~ Binomial(gained + lost, 1/2)

    Args:
        num_gained: problems that the second policy alone answers right, >= 0.
        num_lost: problems that the first policy alone answers right, >= 0.

    Returns:
        In (0, 1]; 1 where no problem tells the two apart.

    Reference: McNemar (1947), "Note on the sampling error of the difference between correlated proportions or
    percentages", Psychometrika 12(2); the binomial, not the chi-square that approximates it.
    """
    _check_counts(num_gained=num_gained, num_lost=num_lost)
    n = num_gained + num_lost
    tail: int = sum(comb(n, k) for k in range(min(num_gained, num_lost) + 1))
    return min(1.0, 2 * tail / 2**n)


def mcnemar_interval(
    num_gained: int, num_lost: int, num_problems: int, *, level: float = 0.95
) -> tuple[float, float]:
    """Interval of the difference between two accuracies on the same problems; the exact McNemar test's own.

    The bounds of Clopper and Pearson for the chance q that a problem that tells the two apart is a gain, carried over
    to the difference:

        difference = (2 q - 1) (gained + lost) / problems

    It leaves 0 out exactly where `mcnemar_exact` is below 1 - level. It is conditional on how many problems tell the
    two apart; where none does, it is (0, 0), and says nothing.

    Args:
        num_gained, num_lost: see `mcnemar_exact`.
        num_problems: all problems, >= 1 and >= num_gained + num_lost.
        level: coverage, in (0, 1).

    Returns:
        (low, high), each in [-1, 1].

    Reference: Clopper and Pearson (1934), Biometrika 26(4); for paired proportions: Newcombe (1998), Statistics in
    Medicine 17(22), the exact conditional interval.
    """
    _check_counts(num_gained=num_gained, num_lost=num_lost)
    _check_level(level)
    n = num_gained + num_lost
    if num_problems < max(1, n):
        raise ValueError(f"num_problems is {num_problems}, and must be at least 1 and gains and losses together ({n})")
    tail = (1 - level) / 2
    low, high = _clopper_pearson_low(num_gained, n, tail), 1 - _clopper_pearson_low(num_lost, n, tail)
    return (2 * low - 1) * n / num_problems, (2 * high - 1) * n / num_problems


def _clopper_pearson_low(successes: int, n: int, tail: float) -> float:
    """The q with P(X >= successes) = tail, X ~ Binomial(n, q); 0 without a success."""
    if successes == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _upper_tail(successes, n, middle) > tail else (middle, high)
    return low


def _upper_tail(successes: int, n: int, q: float) -> float:
    """P(X >= successes), X ~ Binomial(n, q), 0 < q < 1."""
    ways = lgamma(n + 1)
    return fsum(
        exp(ways - lgamma(k + 1) - lgamma(n - k + 1) + k * log(q) + (n - k) * log(1 - q))
        for k in range(successes, n + 1)
    )


def paired_bootstrap(
    differences: Sequence[float], *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of a mean difference between two policies on the same problems, by resampling the problems.

    Problems are drawn anew with replacement, each with both policies' numbers; the bounds are percentiles of the means
    over the resamples.

    Args:
        differences: one a problem, such as the second policy's fraction of right samples less the first's; not empty.
        num_resamples: >= 1.
        level: coverage, in (0, 1).
        seed: of the resampling; the same gives the same bounds.

    Returns:
        (low, high): the percentiles (1 - level) / 2 and (1 + level) / 2, each the mean of a resample.

    Reference: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", ch. 13; paired over test items: Koehn
    (2004), "Statistical significance tests for machine translation evaluation", section 4.
    """
    _check_level(level)
    if not differences or num_resamples < 1:
        raise ValueError(
            f"{len(differences)} differences and num_resamples {num_resamples}: each must be at least 1; give one "
            "difference a problem"
        )
    generator, n = random.Random(seed), len(differences)
    means = sorted(fmean(generator.choices(differences, k=n)) for _ in range(num_resamples))
    cut = int(num_resamples * (1 - level) / 2)
    return means[cut], means[-1 - cut]


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        if value < 0:
            raise ValueError(f"{name} is {value}, and must be at least 0")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, and must lie between 0 and 1; 0.95 is usual")
