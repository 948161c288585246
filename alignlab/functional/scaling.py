"""Figures of k samples of a problem, estimated without bias from a pool of n >= k samples of it.

Each is the mean over all subsets of k samples, in closed form. Reference for the idea: Chen et al. (2021),
arXiv:2107.03374, Eq. 1 (`estimation.pass_at_k`).
"""

from collections.abc import Sequence
from math import comb

import torch
from jaxtyping import Float
from torch import Tensor

MAX_POOL = 1000
"""Numbers of subsets of a larger pool are beyond the largest floating-point number."""


def best_at_k(scores: Sequence[float], values: Sequence[float], k: int) -> float:
    """Expected value of the best of k samples, by order statistics.

        sum over scores s: (C(#{scores <= s}, k) - C(#{scores < s}, k)) / C(n, k) * mean value of the samples of score s

    Of samples with equal scores each is as likely to be taken.

    Args:
        scores: what the best is chosen by, one a sample; -inf for a sample that has no score.
        values: what the choice is worth, such as 1 for a right answer.
        k: 1..n.

    Reference: best-of-n: Stiennon et al. (2020), arXiv:2009.01325; its estimate from a pool: Nakano et al. (2021),
    arXiv:2112.09332, App. I.
    """
    n = len(scores)
    _check_k(k, n)
    if len(values) != n:
        raise ValueError(f"values has {len(values)} entries, and must have one for each of {n} scores; give both")
    ranked = sorted(range(n), key=lambda i: scores[i])
    total, below = 0.0, 0
    while below < n:
        tied = [i for i in ranked[below:] if scores[i] == scores[ranked[below]]]
        chance = (comb(below + len(tied), k) - comb(below, k)) / comb(n, k)
        total += chance * sum(values[i] for i in tied) / len(tied)
        below += len(tied)
    return total


def majority_at_k(
    votes: Sequence[int], values: Sequence[float], *, num_silent: int, max_k: int
) -> Float[Tensor, "K"]:
    """Expected value of the answer that most of k samples give, for each k from 1 to K = max_k.

    The number of votes of each answer in a subset is hypergeometric. For an answer with m votes, the ways in which each
    other answer gets fewer, or t of them as many, are counted by multiplying polynomials: the coefficient of x^j is the
    number of ways to choose j samples. Of answers with equal votes each is as likely to be taken.

        sum over answers a and m: values_a C(votes_a, m) sum_t ways(m, t, k - m) / (t + 1) / C(n, k)

    All terms are positive, so that float64 is exact to rounding.

    Args:
        votes: of each distinct answer, the number of samples of the pool that give it, >= 1.
        values: worth of each answer; where samples of one answer differ, their mean.
        num_silent: samples without an answer, which do not vote; k of them are worth 0.
        max_k: largest k, 1..n, n = sum of votes + num_silent <= 1000.

    Returns:
        [K], float64; entry i is for k = i + 1.

    Reference: Wang et al. (2022), arXiv:2203.11171.
    """
    n = sum(votes) + num_silent
    _check_k(max_k, n)
    if n > MAX_POOL:
        raise ValueError(f"the pool has {n} samples, and must have at most {MAX_POOL}; leave some out")
    ways = torch.zeros(max_k + 1, dtype=torch.float64)
    for winner, (count, value) in enumerate(zip(votes, values, strict=True)):
        if value == 0:
            continue
        others = [*votes[:winner], *votes[winner + 1 :]]
        for m in range(1, min(count, max_k) + 1):
            ways[m:] += value * float(comb(count, m)) * _ways_to_lose(others, m, max_k - m)
    # Samples without an answer fill up the subsets.
    filled = torch.zeros_like(ways)
    for silent in range(min(num_silent, max_k) + 1):
        filled[silent:] += float(comb(num_silent, silent)) * ways[: len(ways) - silent]
    subsets = torch.tensor([float(comb(n, k)) for k in range(1, max_k + 1)], dtype=torch.float64)
    return filled[1:] / subsets


def _ways_to_lose(others: Sequence[int], m: int, room: int) -> Float[Tensor, "J"]:
    """Return, for each j from 0 to room, the ways to choose j samples of answers that get at most m votes each.

    A way in which t of the answers have m votes counts 1 / (t + 1).
    """
    max_ties = min(sum(count >= m for count in others), room // m)
    ways = torch.zeros(max_ties + 1, room + 1, dtype=torch.float64)
    ways[0, 0] = 1
    for count in others:
        longer = ways.clone()
        for drawn in range(1, min(count, m, room) + 1):
            added = float(comb(count, drawn)) * ways[:, : room + 1 - drawn]
            if drawn < m:
                longer[:, drawn:] += added
            else:
                longer[1:, drawn:] += added[:-1]
        ways = longer
    return (ways / torch.arange(1, max_ties + 2, dtype=torch.float64)[:, None]).sum(0)


def _check_k(k: int, n: int) -> None:
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, and must lie between 1 and the pool's {n} samples; draw more samples")
