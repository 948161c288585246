"""Models without weights: all shapes on the meta device, no memory, nothing read but headers of files.

Within `without_weights` everything that loads or makes a model gives such a one, so that a trainer can be made, and
refuses what it refuses, before any weight is loaded. Nothing can be computed with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

_LOADS_WEIGHTS: ContextVar[bool] = ContextVar("loads_weights", default=True)


@contextmanager
def without_weights() -> Iterator[None]:
    """Have models loaded and made without weights within the context."""
    token = _LOADS_WEIGHTS.set(False)
    try:
        yield
    finally:
        _LOADS_WEIGHTS.reset(token)


def loads_weights() -> bool:
    """Return False within `without_weights`."""
    return _LOADS_WEIGHTS.get()


def is_empty(model: nn.Module) -> bool:
    """Return whether a model has shapes alone."""
    return any(parameter.is_meta for parameter in model.parameters())


def put_on(model: nn.Module, device: torch.device) -> None:
    """Move a model to a device, unless it is empty."""
    if not is_empty(model):
        model.to(device)
