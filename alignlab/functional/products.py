"""Products of matrices in the dtype in which the processor at hand is fastest.

Many processors multiply bfloat16 slower than float32: those without instructions for it, and Intel's that have
AVX-512's but not AMX (see `processor.has_fast_bfloat16`). There a product of many rows is computed from float32 copies,
block by block, and its result rounded once, so that it is no less exact: products of two bfloat16 are exact in float32,
and both ways add them up in float32. They are for numbers, not for autograd, which would keep the copies.

Shapes: M rows, I inputs, O outputs.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from alignlab.native.processor import has_fast_bfloat16

LEAST_ROWS = 128
"""Rows from which on it pays to copy a weight to float32."""
BLOCK_NUMBERS = 2**21
"""Numbers of a weight that are copied at one time: 8 MiB."""


def product_dtype(rows: Float[Tensor, "M _"]) -> torch.dtype:
    """Return the dtype in which products of these rows are computed: float32, or their own."""
    is_slow = rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and not has_fast_bfloat16()
    return torch.float32 if is_slow and len(rows) >= LEAST_ROWS else rows.dtype


def by_inputs(rows: Float[Tensor, "M I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "M O"]:
    """Return rows W^T, in the dtype of the rows, which the weight has too."""
    dtype = product_dtype(rows)
    if dtype == rows.dtype:
        return rows @ weight.T
    wide, output = rows.to(dtype), rows.new_empty(len(rows), len(weight))
    for block in _blocks(weight):
        output[:, block] = wide @ weight[block].to(dtype).T
    return output


def by_outputs(rows: Float[Tensor, "M O"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "M I"]:
    """Return rows W, in the dtype of the rows, which the weight has too."""
    dtype = product_dtype(rows)
    if dtype == rows.dtype:
        return rows @ weight
    total = rows.new_zeros(len(rows), weight.shape[1], dtype=dtype)
    for block in _blocks(weight):
        total.addmm_(rows[:, block].to(dtype), weight[block].to(dtype))
    return total.to(rows.dtype)


def _blocks(weight: Tensor) -> Iterator[slice]:
    """Yield slices of the outputs of a weight."""
    step = max(1, BLOCK_NUMBERS // weight.shape[1])
    return (slice(start, start + step) for start in range(0, len(weight), step))
