"""Parity in float64 with `transformers`, which computes norms, softmaxes and rotations in float32 in any model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def really_float64() -> Iterator[None]:
    """Let `torch.float32` and `Tensor.float` mean float64, as `transformers` looks these names up when it computes."""
    names: Any = torch
    single, cast = torch.float32, torch.Tensor.float
    names.float32 = names.float = torch.float64
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    try:
        yield
    finally:
        names.float32 = names.float = single
        torch.Tensor.float = cast  # type: ignore[method-assign]
