"""Estimates from repeated samples, and of differences between two policies on the same problems."""

from collections.abc import Sequence
from math import comb, exp, fsum, lgamma, log

import torch

_BISECTIONS = 60  # halvings of [0, 1]: below the spacing of floats near any bound that matters
_ROUNDING = 1e-12  # of a sum, relative to its largest: sums that differ by less are equal
_DRAWN_TOGETHER = 256


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
    _check_at_least(0, num_gained=num_gained, num_lost=num_lost)
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
    _check_at_least(0, num_gained=num_gained, num_lost=num_lost)
    _check_level(level)
    n = num_gained + num_lost
    if num_problems < max(1, n):
        raise ValueError(f"num_problems is {num_problems}, and must be at least 1 and gains and losses together ({n})")
    if n == 0:
        return 0.0, 0.0
    tail = (1 - level) / 2
    low, high = _clopper_pearson_low(num_gained, n, tail), 1 - _clopper_pearson_low(num_lost, n, tail)
    return (2 * low - 1) * n / num_problems, (2 * high - 1) * n / num_problems


def _clopper_pearson_low(successes: int, n: int, tail: float) -> float:
    """Return q with P(X >= successes) = tail, X ~ Binomial(n, q); 0 without a success."""
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


def sign_flip_test(differences: Sequence[float], *, num_flips: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of the paired permutation test: is the mean difference more than chance?

    Where neither of two policies is better, every problem's difference could as well have had the other sign.

        p = (1 + #{flips: |sum of s_i d_i| >= |sum of d_i|}) / (1 + flips),  s_i = +1 or -1, each half the time

    Valid however few problems there are: where 5 differ, p is about 2 / 2^5 = 0.06 at the least. Of differences that
    are -1, 0 or 1 it is an estimate of `mcnemar_exact`.

    Args:
        differences: one a problem, such as the second policy's fraction of right samples less the first's; not empty.
        num_flips: random choices of all signs, >= 1.
        seed: of the choices; the same gives the same value.

    Returns:
        In (0, 1].

    Reference: Fisher (1935), "The Design of Experiments", section 21; the random choices and the 1 in both counts:
    Phipson and Smyth (2010), Statistical Applications in Genetics and Molecular Biology 9(1).
    """
    _check_draws(differences, num_flips=num_flips)
    values = torch.tensor(differences, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    observed = values.sum().abs() - _ROUNDING * values.abs().sum()
    as_far = 0
    for start in range(0, num_flips, _DRAWN_TOGETHER):
        shape = (min(_DRAWN_TOGETHER, num_flips - start), len(values))
        signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).double() * 2 - 1
        as_far += int(((signs @ values).abs() >= observed).sum())
    return (1 + as_far) / (1 + num_flips)


def paired_bootstrap(
    differences: Sequence[float], *, num_resamples: int = 2000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Interval of a mean difference between two policies on the same problems, by resampling the problems.

    Problems are drawn anew with replacement, each with both policies' numbers; the bounds are percentiles of the means
    over the resamples. With few problems it is too narrow: of equal differences it has no width at all, so ask
    `sign_flip_test` whether a difference is more than chance.

    Args:
        differences: see `sign_flip_test`.
        num_resamples: >= 1.
        level: coverage, in (0, 1).
        seed: of the resampling; the same gives the same bounds.

    Returns:
        (low, high): the percentiles (1 - level) / 2 and (1 + level) / 2, each the mean of a resample.

    Reference: Efron and Tibshirani (1993), "An Introduction to the Bootstrap", ch. 13; paired over test items: Koehn
    (2004), "Statistical significance tests for machine translation evaluation", section 4.
    """
    _check_level(level)
    _check_draws(differences, num_resamples=num_resamples)
    values = torch.tensor(differences, dtype=torch.float64)
    generator, n = torch.Generator().manual_seed(seed), len(values)
    means = sorted(
        float(values[torch.randint(n, (n,), generator=generator)].mean()) for _ in range(num_resamples)
    )
    cut = int(num_resamples * (1 - level) / 2)
    return means[cut], means[-1 - cut]


def _check_draws(differences: Sequence[float], **draws: int) -> None:
    if not differences:
        raise ValueError("differences is empty, and must hold at least 1; give one a problem")
    _check_at_least(1, **draws)


def _check_at_least(least: int, **counts: int) -> None:
    for name, value in counts.items():
        if value < least:
            raise ValueError(f"{name} is {value}, and must be at least {least}")


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is {level}, and must lie between 0 and 1; 0.95 is usual")
