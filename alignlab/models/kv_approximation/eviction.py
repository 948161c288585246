"""A cache that drops all but the first and the newest tokens.

Layers with a window of their own keep it. Reference: Xiao et al. (2024), StreamingLLM, arXiv:2309.17453.

Shapes: N tokens, H heads, K kv heads, D size of a query's or key's head, V size of a value's head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.models.attention_plan import attention_blocks
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.packed_attention import block_attention, in_autocast_dtype, packed_attention
from alignlab.models.sink_window import SinkWindow, Window
from alignlab.types import Segments


@dataclass(frozen=True)
class WindowedTokens:
    """Tokens outside of a window are dropped; positions stay what they were.

    Attributes:
        window: tokens that are kept.
    """

    window: SinkWindow

    def windows(self, spec: LayerCacheSpec) -> tuple[Window, ...]:
        """Return the window of what is kept of a layer's tokens."""
        return (self.window if spec.window is None else spec.window,)

    def block_bytes(self, spec: LayerCacheSpec, dtype: torch.dtype, block_size: int) -> dict[Window, int]:
        """Return the bytes of a block of a layer's tokens, by window, in a model of a dtype."""
        [window] = self.windows(spec)
        return {window: dtype.itemsize * spec.token_numel * block_size}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, record: Tensor | None = None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:
        """Return packed attention to the tokens that are kept, which need no record; see `KVApproximation`."""
        if sliding_window is not None:
            return packed_attention(
                query, key, value, segments, scaling=scaling, sliding_window=sliding_window, softcap=softcap,
                sinks=sinks,
            )
        return block_attention(
            *in_autocast_dtype(query, key, value), attention_blocks(segments, self.window), scaling=scaling,
            softcap=softcap, sinks=sinks,
        )
