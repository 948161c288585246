"""The tokens of a sequence that its queries see: the newest ones, the first ones beside them, or those that were kept.

Reference: Xiao et al. (2024), StreamingLLM, arXiv:2309.17453, Section 3.2; here tokens keep their true positions.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SinkWindow(NamedTuple):
    """The tokens that a token sees: those at positions below `sinks`, and the last `size` tokens, itself included."""

    size: int
    sinks: int

    def sees(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return whether queries see keys, by their positions, which broadcast."""
        return (keys <= queries) & ((keys > queries - self.size) | (keys < self.sinks))


class KeptTokens(NamedTuple):
    """The tokens that a sequence has left at its boundaries: after its prompt, and after every `interval` tokens more.

    At a boundary with more than `budget` tokens, the `sinks` first ones, the `recent` last ones and `heavy` of the
    others stay. Queries up to a boundary see all that the boundary before it left, and what came since. The `observed`
    last queries before a boundary choose what stays.
    """

    heavy: int
    recent: int
    sinks: int
    interval: int | None
    observed: int

    @property
    def query_window(self) -> int:
        """The window of the queries that are kept for the next boundary, whose token is one more."""
        return self.observed + 1

    @property
    def budget(self) -> int:
        """Tokens that a boundary leaves, at most."""
        return self.sinks + self.heavy + self.recent

    def boundary(self, position: int, num_prompt: int) -> int:
        """Return the last boundary at or before a position, which is not in the prompt."""
        return num_prompt if self.interval is None else position - (position - num_prompt) % self.interval

    def next_boundary(self, position: int, num_prompt: int) -> int | None:
        """Return the first boundary after a position; None without any."""
        if position < num_prompt:
            return num_prompt
        return None if self.interval is None else self.boundary(position, num_prompt) + self.interval

    def num_dropped(self, position: int, num_prompt: int) -> int:
        """Return how many tokens are dropped before the one at a position is computed."""
        return 0 if position < num_prompt else max(0, self.boundary(position, num_prompt) - self.budget)

    def most_kept(self, num_tokens: int, num_prompt: int) -> int:
        """Return the most tokens that a sequence has at one time after its prompt, until it is `num_tokens` long."""
        if self.interval is None:
            return num_tokens - max(0, num_prompt - self.budget)
        return min(num_tokens, self.budget + self.interval)


Window = int | SinkWindow | KeptTokens | None
"""Tokens that a layer's queries see: the last ones, those and the first ones, those that were kept, or all."""


def size_of(window: Window) -> int | None:
    """Return how many of the last tokens a query sees, itself included; None for all, or all that were kept."""
    if isinstance(window, KeptTokens):
        return None
    return window.size if isinstance(window, SinkWindow) else window


def sees(window: Window, queries: Tensor, keys: Tensor) -> Tensor:
    """Return whether queries see keys in a window, by their positions, which broadcast."""
    if isinstance(window, SinkWindow):
        return window.sees(queries, keys)
    visible = keys <= queries  # of keys that were kept
    if window is None or isinstance(window, KeptTokens):
        return visible
    return visible & (keys > queries - window)
