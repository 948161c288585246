"""The states of recurrent layers in a cache of `transformers`, so that `generate` works with them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from alignlab.models.recurrent.runs import Entries


class RecurrentCacheLayer(CacheLayerMixin):
    """Entries of each sequence of a batch, and the number of tokens that they stand for.

    Attributes:
        entries: [B, ...] by name; empty before the first tokens.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.entries: Entries = {}
        self._num_tokens = 0

    def keep(self, entries: Entries, num_tokens: int) -> None:
        """Replace the entries, after `num_tokens` more tokens."""
        self.entries = entries
        self._num_tokens += num_tokens

    def reset(self) -> None:
        self.entries, self._num_tokens = {}, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.entries = {name: entry.index_select(0, beam_idx.to(entry.device)) for name, entry in self.entries.items()}

    def get_seq_length(self) -> int:
        return self._num_tokens

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._num_tokens + query_length, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise AssertionError("a recurrent layer keeps no keys and values")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise AssertionError("a recurrent layer keeps no keys and values")


def kept_entries(cache: Cache | None, layer_idx: int) -> RecurrentCacheLayer | None:
    """Return what a layer keeps in a cache; None without a cache."""
    if cache is None:
        return None
    layer = cache.layers[layer_idx]
    assert isinstance(layer, RecurrentCacheLayer)
    return layer
