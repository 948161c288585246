"""The weights of a matrix that stay when the others are set to zero: scores, and choices among them.

Shapes: O outputs and I inputs of a linear layer. Among equal scores the later one stays.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Choice = Callable[[Tensor], Tensor]
"""Scores [O, I] -> True where a weight stays [O, I]."""


def magnitude_scores(weight: Tensor) -> Tensor:
    """Return |W|, [O, I]. Reference: Han et al. (2015), arXiv:1506.02626, Sec. 3."""
    return weight.float().abs()


def wanda_scores(weight: Tensor, input_norms: Tensor) -> Tensor:
    """Return |W_ij| ||X_j||, [O, I]. Reference: Sun et al. (2023), Wanda, arXiv:2306.11695, Eq. 1.

    Args:
        weight: [O, I].
        input_norms: [I], the Euclidean norm of each input over the calibration tokens.
    """
    return weight.float().abs() * input_norms.float()


def highest_of_matrix(scores: Tensor, dropped: float) -> Tensor:
    """Drop the fraction `dropped`, from 0 to 1, of a matrix: the lowest scores, floor(dropped * O * I) of them."""
    return highest_of_rows(scores.reshape(1, -1), dropped).view_as(scores)


def highest_of_rows(scores: Tensor, dropped: float) -> Tensor:
    """Drop the fraction `dropped`, from 0 to 1, of each row: its lowest scores, floor(dropped * I) of them."""
    return _without_lowest(scores, int(dropped * scores.shape[1]))


def highest_of_groups(scores: Tensor, kept: int, size: int) -> Tensor:
    """Keep the `kept` highest scores of each `size` inputs that follow each other, as hardware for 2:4 reads them.

    Reference: Mishra et al. (2021), arXiv:2104.08378. I must be a multiple of `size`.
    """
    return _without_lowest(scores.reshape(-1, size), size - kept).view_as(scores)


def _without_lowest(scores: Tensor, count: int) -> Tensor:
    """Return True except at the `count` lowest scores of each row."""
    lowest = scores.argsort(dim=1, stable=True)[:, :count]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, lowest, False)


def choice(*, dropped: float | None, pattern: tuple[int, int] | None, by_row: bool) -> Choice:
    """Return the choice of a fraction, of each row or of the whole matrix, or of a pattern (kept, size)."""
    if pattern is not None:
        return partial(highest_of_groups, kept=pattern[0], size=pattern[1])
    assert dropped is not None
    return partial(highest_of_rows if by_row else highest_of_matrix, dropped=dropped)
