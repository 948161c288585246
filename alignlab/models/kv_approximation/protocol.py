"""The protocol of approximations of keys and values, on the trainer's side.

Shapes: N tokens, H heads, K kv heads, D size of a query's or key's head, V size of a value's head.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from alignlab.types import Segments


class KVApproximation(Protocol):
    """An approximation that the trainer's attention can replay."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:
        """Return what `packed_attention` returns, of the keys and values that the engine's cache is left with.

        Args:
            query, key, value: [1,H,N,D], [1,K,N,D], [1,K,N,V], exact, positions already applied. Gradients go straight
                through the approximation.
            segments: on the same device.

        Returns:
            [1,N,H,V]
        """
        ...
