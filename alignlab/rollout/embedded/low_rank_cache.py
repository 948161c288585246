"""A cache that keeps keys and values in few dimensions. Shapes as in `paged_attention`; r dimensions that are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from alignlab.models.kv_approximation.low_rank import LowRank
from alignlab.rollout.embedded.block_pools import Window
from alignlab.rollout.embedded.paged_attention import PagedBatch, RowGroup
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.state_cache import StepStates


class LowRankCache(PagedCache):
    """Keeps r numbers of each entry, under the entry's name."""

    approximation: LowRank
    """With the bases."""

    def write_at(
        self, layer_idx: int, slots: Tensor, positions: Tensor, entries: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Store what is kept of a layer's entries; see `PagedCache.write`.

        Args:
            positions: [N], of the tokens.
        """
        self.check(layer_idx, entries)
        return {
            name: self._store(
                layer_idx, name, slots, self.approximation.encode(layer_idx, name, entry, positions[:, None])
            )
            for name, entry in entries.items()
        }


class LowRankBatch(PagedBatch):
    """The tokens of one step over a `LowRankCache`; see `PagedBatch`.

    Args:
        positions: [N] int64, of the step's tokens in their sequences.
    """

    _cache: LowRankCache

    def __init__(
        self, cache: LowRankCache, slots: Mapping[Window, Tensor], groups: list[RowGroup], positions: Tensor,
        states: StepStates | None = None,
    ) -> None:
        super().__init__(cache, slots, groups, states)
        self._positions = positions

    def update(self, layer_idx: int, entries: Mapping[str, Tensor]) -> Iterator[tuple[RowGroup, dict[str, Tensor]]]:
        """Cache a layer's entries, and yield each group with the entries that few dimensions hold."""
        cache = self._cache
        [window] = cache.windows_of(layer_idx)
        stored = cache.write_at(layer_idx, self._slots[window], self._positions, entries)
        for group in self._groups:
            rows, read = group.positions.shape[0], {}
            for name, entry in entries.items():
                rank = cache.approximation.bases.rank_of(name, entry.shape[-1])
                kept = self._gather(name, stored[name], group.blocks[window]).view(rows, -1, entry.shape[1], rank)
                positions = self._key_positions(group, window, kept.shape[1])[:, 0, 0, :, None]  # [R or 1,L,1]
                read[name] = cache.approximation.decode(layer_idx, name, kept, positions)
            yield group, read
