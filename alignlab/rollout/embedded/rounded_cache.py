"""A cache that keeps keys and values as codes of a byte, with a scale a token and head."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from alignlab.models.kv_approximation.eviction_record import Evictions
from alignlab.models.kv_approximation.record import record_of_layers
from alignlab.models.kv_approximation.rounding import Rounding
from alignlab.rollout.embedded.block_pools import EXPIRED, Window
from alignlab.rollout.embedded.paged_attention import PagedBatch
from alignlab.rollout.embedded.paged_cache import PagedCache


class RoundedCache(PagedCache):
    """Beside the codes of an entry it has their scales, under `scales_name`."""

    approximation: Rounding

    def write(self, layer_idx: int, slots: Tensor, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round a layer's entries and store them; see `PagedCache.write`. The tensors returned hold codes and scales.
        """
        self.check(layer_idx, entries)
        stored: dict[str, Tensor] = {}
        for name, entry in entries.items():
            codes, scales = self.approximation.encode(entry)
            stored[name] = self._store(layer_idx, name, slots, codes)
            stored[scales_name(name)] = self._store(layer_idx, scales_name(name), slots, scales)
        return stored

    def record(
        self, tables: Mapping[Window, list[int]], num_tokens: int, num_prompt: int, *, evictions: Evictions
    ) -> Tensor | None:
        """Return the parities of a sequence's codes; see `PagedCache.record`. Released blocks have none."""
        parities: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        on_device = self.tables_on_device(tables)
        for layer_idx in self.layers:
            blocks = on_device[self.windows_of(layer_idx)[0]]
            known = (blocks != EXPIRED).repeat_interleave(self.block_size)[:num_tokens]
            keys, values = (
                self.rows(layer_idx, name, blocks.clamp_min(0), num_tokens) & 1 for name in ("key", "value")
            )
            parities[layer_idx] = keys, values, known
        return record_of_layers(parities, 1 + max(self.specs))


class RoundedBatch(PagedBatch):
    """The tokens of one step over a `RoundedCache`; see `PagedBatch`."""

    _cache: RoundedCache

    def _read(self, name: str, stored: Mapping[str, Tensor], blocks: Tensor, entry: Tensor) -> Tensor:
        """Return the rounded entries of a name in `blocks`, [blocks, numbers of a block]."""
        codes, scales = (self._gather(part, stored[part], blocks) for part in (name, scales_name(name)))
        out, size = self._memory(f"{name}_read", codes.shape, entry), entry.shape[-1]
        self._cache.approximation.decode(codes.view(-1, size), scales.view(-1), out.view(-1, size))
        return out


def scales_name(name: str) -> str:
    """Return the name under which the scales of a rounded entry are kept."""
    return f"{name}_scales"
