"""Rounded weights in the order in which the kernels read their codes; see source/rounded_rows.h.

Letters in shapes: O outputs, I inputs, G groups of inputs, P panels of 32 outputs, U units of inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from alignlab.models.weight_rounding import to_codes, weight_scales
from alignlab.rollout.embedded.native.binding import PANEL
from alignlab.rollout.embedded.rounding import Rounding

FORMATS = {"int8": 1, "int4": 2, "int8_dynamic": 3}
"""By `quantization.type`; numbers of `Format` in source/weight.h."""
_ROW_SHIFT = 128  # of 8-bit rows, whose codes are stored without a sign
_INT4_SHIFT = 8


class RoundedPanels(NamedTuple):
    """A weight as the kernels read it.

    Attributes:
        units: [P,U,32] int16 or int32, codes of a few inputs of each output.
        scales: [P,G,32] in the weight's dtype.
        shifts: [P,32] int32, what 8-bit rows take off a sum; zeros for others.
    """

    units: Tensor
    scales: Tensor
    shifts: Tensor


def rounded_panels(weight: Tensor, rounding: Rounding) -> RoundedPanels:
    """Round a weight [P*32,I] whose outputs are in the order of the panels."""
    scales = weight_scales(weight, rounding.bits, rounding.group)
    codes = to_codes(weight, scales, rounding.bits)
    num_panels = len(weight) // PANEL
    shifts = torch.zeros(num_panels, PANEL, dtype=torch.int32)
    if rounding.settings.type == "int8_dynamic":
        shifts -= _ROW_SHIFT * codes.sum(1, dtype=torch.int32).view(num_panels, PANEL)
    units = _units(codes, rounding.settings.type).view(num_panels, PANEL, -1)
    return RoundedPanels(units.transpose(1, 2), scales.view(num_panels, PANEL, -1).transpose(1, 2), shifts)


def _units(codes: Tensor, kind: str) -> Tensor:
    """Return codes [O,I] by units [O,U]: two or four of 8 bits, or four of 4 bits of which two share a byte."""
    if kind == "int8":
        return _filled(codes, 2).view(torch.int16)
    if kind == "int8_dynamic":
        return _filled(codes, 4).view(torch.int32)
    shifted = (codes + _INT4_SHIFT).view(torch.uint8).unflatten(1, (-1, 2, 2))
    return (shifted[:, :, 0] | shifted[:, :, 1] << 4).flatten(1).view(torch.int16)


def _filled(codes: Tensor, multiple: int) -> Tensor:
    """Return codes [O,I] with zeros behind them, up to a multiple of inputs."""
    missing = -codes.shape[1] % multiple
    return F.pad(codes, (0, missing)) if missing else codes
