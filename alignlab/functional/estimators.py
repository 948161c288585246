"""Estimates from repeated samples."""

from math import comb


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
