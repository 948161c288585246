"""The protocol of approximations of keys and values.

Shapes: N tokens, H heads, K kv heads, D size of a query's or key's head, V size of a value's head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

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
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, record: Tensor | None = None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:
        """Return what `packed_attention` returns, of the keys and values that the engine's cache is left with.

        Args:
            query, key, value: [1,H,N,D], [1,K,N,D], [1,K,N,V], exact, positions already applied. Gradients go straight
                through the approximation.
            segments: on the same device.
            record: [N, bytes] of this layer, as in `record`; None for a pass of its own.

        Returns:
            [1,N,H,V]
        """
        ...


@runtime_checkable
class LayeredApproximation(Protocol):
    """An approximation that is another one in each layer."""

    def of_layer(self, layer_idx: int) -> KVApproximation:
        """Return the approximation of one layer."""
        ...


class Replay(NamedTuple):
    """The approximation of keys and values in one forward pass.

    Attributes:
        approximation: of the engine's cache.
        record: [N, L, bytes] of the pass's tokens, as in `record`; None without one.
    """

    approximation: KVApproximation
    record: Tensor | None = None

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor, segments: Segments, **options: Any
    ) -> Tensor:
        """Return attention of a layer; see `KVApproximation.attend`."""
        record = None if self.record is None else self.record[:, layer_idx]
        approximation = self.approximation
        if isinstance(approximation, LayeredApproximation):
            approximation = approximation.of_layer(layer_idx)
        return approximation.attend(query, key, value, segments, record, **options)
