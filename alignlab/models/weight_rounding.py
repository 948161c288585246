"""Weights rounded to the nearest integers of 8 or 4 bits, without calibration.

Shapes: O outputs, I inputs, G groups of inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = {"int8": 8, "int4": 4, "int8_dynamic": 8}
"""Bits of a weight's code by the name of a rounding; with int8_dynamic activations are rounded too."""


def weight_scales(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Return the scales of a weight [O,I], one for each group of inputs, [O,G] in its dtype.

        scale = max |w| / ((2^bits - 1) / 2)

    This is the symmetric scale of `compressed-tensors`: the 2^bits codes are spread over the range of +- the largest
    number. A group of zeros has the dtype's eps.

    Args:
        group: inputs that share a scale; None: all of an output.

    Raises:
        ValueError: `group` does not divide the inputs.

    Reference: Dettmers et al. (2022), arXiv:2208.07339, Eq. 1, with one scale a group.
    """
    groups = _grouped(weight, group)
    low, high = groups.amin(-1), groups.amax(-1)  # of the weights as they are: exact, and no copy of them
    scales = (_exact(torch.maximum(high, -low)) / ((2**bits - 1) / 2)).to(weight.dtype)
    return torch.where(scales == 0, torch.finfo(weight.dtype).eps, scales)


def to_codes(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the codes of a weight [O,I] under its scales [O,G], [O,I] int8.

        code = min(max(round(w / scale), -2^(bits - 1)), 2^(bits - 1) - 1)

    Halves go to the even code. The largest number of a group is half a step from two codes; of a positive one the upper
    is missing.
    """
    largest = 2 ** (bits - 1) - 1
    groups = _grouped(weight, weight.shape[1] // scales.shape[1])
    numbers = _exact(groups) / _exact(scales)[..., None]
    return numbers.round_().clamp_(-largest - 1, largest).to(torch.int8).flatten(1)


def from_codes(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the weights [O,I] that codes [O,I] and scales [O,G] stand for, code * scale, at least in float32."""
    return (_grouped(codes, codes.shape[1] // scales.shape[1]) * _exact(scales)[..., None]).flatten(1)


def rounded_weight(weight: Tensor, bits: int, group: int | None = None) -> Tensor:
    """Return the nearest weights [O,I] of so many bits to a weight [O,I], at least in float32."""
    scales = weight_scales(weight, bits, group)
    return from_codes(to_codes(weight, scales, bits), scales)


def row_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Round activations [N,I] to 8 bits: codes [N,I] int8, and a scale a row [N,1], at least in float32.

        scale = max |x| / 127,  code = round(x / scale)

    Reference: Dettmers et al. (2022), arXiv:2208.07339, Eq. 1, by row.
    """
    numbers = _exact(rows)
    scales = (numbers.abs().amax(-1, keepdim=True) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (numbers / scales).round_().clamp_(-127, 127).to(torch.int8), scales


def _exact(numbers: Tensor) -> Tensor:
    """Return numbers at least in float32."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def _grouped(weight: Tensor, group: int | None) -> Tensor:
    """Return a weight [O,I] as [O,G,group].

    Raises:
        ValueError: see `weight_scales`.
    """
    size = weight.shape[1]
    if group is not None and size % group:
        raise ValueError(f"a group has {group} inputs, and must divide the weight's {size}")
    return weight.unflatten(1, (-1, group or size))
