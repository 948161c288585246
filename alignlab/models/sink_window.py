"""A window of the newest tokens, and the first tokens beside it.

Reference: Xiao et al. (2024), StreamingLLM, arXiv:2309.17453, Section 3.2; here tokens keep their true positions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SinkWindow(NamedTuple):
    """What a token sees: tokens at positions below `sinks`, and the last `size` tokens, itself included."""

    size: int
    sinks: int

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return whether queries see keys, by their positions, which broadcast."""
        return (keys <= queries) & ((keys > queries - self.size) | (keys < self.sinks))


Window = int | SinkWindow | None
"""Tokens that a layer's queries see: the last ones, those and the first ones, or all."""


def size_of(window: Window) -> int | None:
    """Return how many of the last tokens a query sees, itself included; None for all."""
    return window.size if isinstance(window, SinkWindow) else window


def sees(window: Window, queries: Tensor, keys: Tensor) -> Tensor:
    """Return whether queries see keys in a window, by their positions, which broadcast."""
    if isinstance(window, SinkWindow):
        return window.sees(queries, keys)
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)
