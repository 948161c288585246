"""Parity in float64 with `transformers`, which computes norms, softmaxes and rotations in float32 in any model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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


def grouped_product(rows: Tensor, weight: Tensor, *, offs: Tensor) -> Tensor:
    """Return `torch`'s grouped product, which does not take float64: rows [M, in] times the weight of their group.

    Args:
        rows: sorted by group.
        weight: [E, in, out].
        offs: [E], where each group's rows end.
    """
    ends = offs.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat([rows[start:end] @ group for start, end, group in zip(starts, ends, weight, strict=True)])


@contextmanager
def grouped_in_float64() -> Iterator[None]:
    """Let grouped products take float64, which torch's refuse, by a product for each group."""
    functional: Any = torch.nn.functional
    own = functional.grouped_mm

    def product(rows: torch.Tensor, weight: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        return (grouped_product if rows.dtype == torch.float64 else own)(rows, weight, offs=offs)

    functional.grouped_mm = product
    try:
        yield
    finally:
        functional.grouped_mm = own
