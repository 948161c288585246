"""A cache with a budget of tokens for each sequence: what is over it is dropped, and the rest moves up.

A slot holds, in each layer and kv head, another token: as many stay in each. So the blocks of a sequence are the same
for all of them, and those behind what stays are freed. Shapes as in `heavy_hitters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.kv_approximation.evicted_tokens import EvictedTokens
from alignlab.models.kv_approximation.eviction_record import Evictions, record_of_evictions
from alignlab.models.kv_approximation.heavy_hitters import ScoreOptions
from alignlab.rollout.embedded.block_pools import Window
from alignlab.rollout.embedded.evictions import Eviction, Stayed
from alignlab.rollout.embedded.paged_attention import PagedBatch
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.transfer import to_device

_QUERY = "query"


class _Slots(NamedTuple):
    """Slots of an eviction, on the device of the cache.

    Attributes:
        sources: of the tokens that are there.
        targets: of the new blocks.
        queries: of the observed queries.
    """

    sources: Tensor
    targets: Tensor
    queries: Tensor


class EvictingCache(PagedCache):
    """Beside the keys and values of a layer it has the newest queries, which choose what stays at the next boundary.

    Args:
        approximation: the budget.
        specs, block_size, records_routing: see `PagedCache`.
    """

    approximation: EvictedTokens

    def __init__(
        self, specs: Mapping[int, LayerCacheSpec], block_size: int, approximation: EvictedTokens,
        *, records_routing: bool = False,
    ) -> None:
        super().__init__(specs, block_size, approximation, records_routing=records_routing)
        self.options: dict[int, ScoreOptions] = {}
        self.heads = {
            layer_idx: spec.per_token["key"][0]
            for layer_idx, spec in self.specs.items() if approximation.drops_in(spec)
        }

    def window_of(self, layer_idx: int, name: str) -> Window:
        """Return the window of the queries, or of the keys and values, of a layer."""
        return self.windows_of(layer_idx)[-1 if name == _QUERY else 0]

    def write_queries(self, layer_idx: int, slots: Tensor, query: Tensor, options: ScoreOptions) -> None:
        """Store the queries [N,H,D] of a layer, and note how it makes weights of their products."""
        self.options[layer_idx] = options
        self._store(layer_idx, _QUERY, slots, query)

    def evict(self, eviction: Eviction) -> Stayed:
        """Move the tokens of a sequence that stay into their new blocks, and return which they are."""
        first, boundary = eviction.sequence, eviction.boundary
        chosen = first.evictions.get(boundary)
        if chosen is None and boundary == first.num_prompt:
            chosen = first.request.kept_of_prompt
        places, stayed, received = {}, {}, {}
        slots = self._slots(eviction)
        for layer_idx in self.heads:
            places[layer_idx], received[layer_idx] = self._choose(eviction, slots, layer_idx)
            if chosen is not None:
                places[layer_idx] = chosen[layer_idx]
            stayed[layer_idx] = self._positions(eviction, layer_idx).gather(1, places[layer_idx])
            self._move(slots, layer_idx, places[layer_idx])
        if boundary == first.num_prompt:
            first.request.kept_of_prompt = places
        return Stayed(places, stayed, received)

    def record(
        self, tables: Mapping[Window, list[int]], num_tokens: int, num_prompt: int, *, evictions: Evictions
    ) -> Tensor | None:
        """Return what was dropped of a sequence's tokens, and when; see `eviction_record`."""
        if not self.heads:
            return None
        return record_of_evictions(evictions, self.approximation.kept, self.heads, num_tokens, num_prompt)

    def _choose(self, eviction: Eviction, slots: _Slots, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return the places [K,budget] of the tokens that stay in a layer, and what they have received."""
        shape = (len(slots.queries), -1, self.specs[layer_idx].key_size)
        query = self.layers[layer_idx][_QUERY].index_select(0, slots.queries).view(shape)
        return self.approximation.choose(
            query, self._rows_of_heads(slots, layer_idx, "key"), self._positions(eviction, layer_idx),
            eviction.sequence.received.get(layer_idx), self.options[layer_idx], end=eviction.boundary,
        )

    def _positions(self, eviction: Eviction, layer_idx: int) -> Tensor:
        """Return the positions [K,n] of the tokens that are there in a layer."""
        old = eviction.sequence.stayed.get(layer_idx)
        num_old = 0 if old is None else old.shape[1]
        device = self.layers[layer_idx]["key"].device
        new = torch.arange(eviction.boundary - eviction.num_tokens + num_old, eviction.boundary, device=device)
        new = new.expand(self.heads[layer_idx], -1)
        return new if old is None else torch.cat((old, new), dim=1)

    def _move(self, slots: _Slots, layer_idx: int, places: Tensor) -> None:
        """Write the tokens at places [K,budget] into the new blocks, in order."""
        for name in ("key", "value"):
            rows = self._rows_of_heads(slots, layer_idx, name)
            kept = rows.gather(1, places[..., None].expand(-1, -1, rows.shape[2])).transpose(0, 1)
            self._store(layer_idx, name, slots.targets[: places.shape[1]], kept)

    def _rows_of_heads(self, slots: _Slots, layer_idx: int, name: str) -> Tensor:
        """Return the entries [K,n,D] of the tokens that are there in a layer."""
        rows = self.layers[layer_idx][name].index_select(0, slots.sources)
        return rows.unflatten(1, self.specs[layer_idx].per_token[name]).transpose(0, 1)

    def _slots(self, eviction: Eviction) -> _Slots:
        """Return the slots of an eviction, moved to the device by one copy."""
        num_queries = min(self.approximation.kept.observed, eviction.boundary)
        device = self.layers[next(iter(self.heads))]["key"].device
        sources, targets, queries = (
            (torch.tensor(blocks)[:, None] * self.block_size + torch.arange(self.block_size)).flatten()
            for blocks in (eviction.sources, eviction.targets, eviction.query_blocks)
        )
        queries = queries[eviction.num_before_queries :][:num_queries]
        return _Slots(*to_device([sources[: eviction.num_tokens], targets, queries], device))


class EvictingBatch(PagedBatch):
    """The tokens of one step over an `EvictingCache`; see `PagedBatch`."""

    _cache: EvictingCache

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor | None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:
        """Cache the queries of a layer that drops tokens, and attend; see `PagedBatch.attend`."""
        options: dict[str, Any] = {"scaling": scaling, "softcap": softcap, "sinks": sinks}
        if layer_idx in self._cache.heads:
            slots = self._slots[self._cache.approximation.kept.query_window]
            self._cache.write_queries(layer_idx, slots, query[0].transpose(0, 1), ScoreOptions(**options))
        return super().attend(layer_idx, query, key, value, sliding_window=sliding_window, **options)
