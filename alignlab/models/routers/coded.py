"""Choices of experts as integers, of which some are dropped: expert e is e where it computes, -2 - e where it does not.

-1 is left for "no record". Such choices fit in the int16 of a record, so that a replay drops what was dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor


def coded(experts: Tensor, computes: Tensor) -> Tensor:
    """Return experts >= 0 as choices, dropped where `computes` is False."""
    return torch.where(computes, experts, -2 - experts)


def experts_of(choices: Tensor) -> Tensor:
    """Return the experts that were chosen, dropped or not."""
    return torch.where(choices < 0, -2 - choices, choices)
