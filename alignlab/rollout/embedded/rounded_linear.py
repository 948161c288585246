"""Linear layers of rounded weights, by torch's own products on a CPU.

Shapes: N tokens, O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.models.weight_rounding import row_codes, to_codes, weight_scales
from alignlab.rollout.embedded.rounding import Rounding

_INT4_OUTPUTS = 16  # torch's packing takes so many together
_INT8_INPUTS = 32
"""Torch's products of 8 bits take so many inputs together. Of bfloat16 rows that are no multiple of 16 they read beyond
the end, and of one input the product of two integers is wrong."""


class _RoundedLinear(nn.Module):
    """A frozen linear layer of a rounded weight."""

    def __init__(self, bias: Tensor | None) -> None:
        super().__init__()
        self._bias = None if bias is None else bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + bias of rows x [..., I], [..., O] in their dtype."""
        product = self._product(x.reshape(-1, x.shape[-1]))
        if self._bias is not None:
            product = product + self._bias
        return product.to(x.dtype).unflatten(0, x.shape[:-1])

    def _product(self, rows: Tensor) -> Tensor:
        """Return the product [N,O] of rows [N,I] with the rounded weight."""
        raise NotImplementedError


class Int8Linear(_RoundedLinear):
    """Weights in 8 bits; rows as they are."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        self._codes, self._scales = _filled(codes), scales[:, 0].contiguous()

    def _product(self, rows: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(_filled(rows), self._codes, self._scales)


class Int8DynamicLinear(_RoundedLinear):
    """Weights in 8 bits, rows too, each with a scale of its own."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        self._codes, self._scales = _filled(codes).T, scales[:, 0]

    def _product(self, rows: Tensor) -> Tensor:
        codes, scales = row_codes(rows)
        return torch._int_mm(_filled(codes), self._codes) * scales * self._scales


class Int4Linear(_RoundedLinear):
    """Weights in 4 bits in groups of inputs; rows as they are."""

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__(bias)
        self._num_outputs, self._group = len(codes), codes.shape[1] // scales.shape[1]
        filled = -len(codes) % _INT4_OUTPUTS
        codes, scales = (F.pad(tensor, (0, 0, 0, filled)) for tensor in (codes, scales))
        self._codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 1)
        scales = scales.T  # torch has [G,O], and a number that is added to each code times its scale
        self._scales = torch.stack([scales, torch.zeros_like(scales)], -1).contiguous()

    def _product(self, rows: Tensor) -> Tensor:
        product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self._codes, self._group, self._scales)
        return product[:, : self._num_outputs]


def _filled(rows: Tensor) -> Tensor:
    """Return rows [N,I] with zeros behind them, up to a multiple of `_INT8_INPUTS`."""
    missing = -rows.shape[1] % _INT8_INPUTS
    return F.pad(rows, (0, missing)) if missing else rows


_LINEAR = {"int8": Int8Linear, "int4": Int4Linear, "int8_dynamic": Int8DynamicLinear}


def rounded_linear(layer: nn.Module, rounding: Rounding) -> nn.Module:
    """Return a linear layer with its weight rounded."""
    weight, bias = layer.get_parameter("weight").detach(), layer.bias
    scales = weight_scales(weight, rounding.bits, rounding.group)
    codes = to_codes(weight, scales, rounding.bits)
    return _LINEAR[rounding.settings.type](codes, scales, bias)  # type: ignore[arg-type]
