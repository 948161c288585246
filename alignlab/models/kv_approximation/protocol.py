"""The protocol of approximations of keys and values.

Shapes: N tokens, H heads, K kv heads, D size of a query's or key's head, V size of a value's head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from alignlab.models.sink_window import Window
from alignlab.types import Segments

if TYPE_CHECKING:
    from alignlab.models.cache_spec import LayerCacheSpec


class KVApproximation(Protocol):
    """An approximation that the engine's cache has, and the trainer's attention can replay."""

    def windows(self, spec: LayerCacheSpec) -> tuple[Window, ...]:
        """Return the windows of what is kept of a layer's tokens, the widest first."""
        ...

    def block_bytes(self, spec: LayerCacheSpec, dtype: torch.dtype, block_size: int) -> dict[Window, int]:
        """Return the bytes of a block of a layer's tokens, by window, in a model of a dtype."""
        ...

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
