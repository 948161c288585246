"""Inputs of attention with a gradient, and the comparison with a slow twin: values and gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def inputs(num_tokens: int) -> list[Tensor]:
    """Return random query [1,4,N,8], key and value [1,2,N,8], the same at each call, each requiring a gradient."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, n, num_tokens, 8, generator=generator).double().requires_grad_() for n in (4, 2, 2)]


def assert_equals_twin(output: Tensor, ours: Sequence[Tensor], expected: Tensor, twins: Sequence[Tensor]) -> None:
    """Compare an output with a twin's, and the gradients of both by their inputs, which no other pass has used."""
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=0)
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).double()
    (output * weights).sum().backward()
    (expected * weights).sum().backward()
    for one, other in zip(ours, twins, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-9, rtol=0)
