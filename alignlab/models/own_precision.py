"""Functions whose float32 autocast must not round."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


def in_own_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """Switch autocast off within the forward or backward pass of a `torch.autograd.Function`."""

    @wraps(function)
    def wrapped(ctx: Any, first: Tensor, *args: Any) -> Any:
        if first.is_meta:  # nothing is computed, and autocast does not know the device
            return function(ctx, first, *args)
        with torch.autocast(first.device.type, enabled=False):
            return function(ctx, first, *args)

    return wrapped
