"""Gradients that pass an approximation as if it were none."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function


def straight_through(x: Tensor, approximation: Tensor) -> Tensor:
    """Return the approximation, bit for bit, with the gradient of x.

    Args:
        x, approximation: of one shape; no gradient goes into the approximation.

    Reference: Bengio et al. (2013), arXiv:1308.3432, Section 3.
    """
    result: Tensor = _StraightThrough.apply(x, approximation)
    return result


class _StraightThrough(Function):
    """x + (approximation - x) would round: the approximation's bits are what the engine has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, approximation: Tensor) -> Tensor:
        """Return the approximation."""
        return approximation.view_as(approximation)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Return the gradient for x."""
        return grad, None
