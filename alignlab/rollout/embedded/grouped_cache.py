"""A cache whose old tokens are kept in 4 bits: exact entries of the newest tokens, and rounded ones of all groups.

The exact entries are those of a window, whose blocks go as the window leaves them; a group is rounded when its last
token is written. Shapes: M groups, G tokens of a group, and as in `paged_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.kv_approximation.eviction_record import Evictions
from alignlab.models.kv_approximation.groups import GroupedRounding, Int4, from_int4
from alignlab.models.kv_approximation.record import record_of_layers
from alignlab.rollout.embedded.block_pools import EXPIRED, Window
from alignlab.rollout.embedded.paged_attention import PagedBatch, RowGroup
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.state_cache import StepStates

_ROUNDED = "rounded_"


class GroupedCache(PagedCache):
    """Beside the exact entries of a layer it has the parts of the rounded ones, such as "rounded_key_codes".

    Args:
        approximation: the groups; a block holds whole ones.
        specs, block_size, records_routing: see `PagedCache`.
    """

    approximation: GroupedRounding

    def __init__(
        self, specs: Mapping[int, LayerCacheSpec], block_size: int, approximation: GroupedRounding,
        *, records_routing: bool = False,
    ) -> None:
        assert block_size % approximation.group == 0, "a group lies in one block"
        super().__init__(specs, block_size, approximation, records_routing=records_routing)
        self.tokens_of_group = approximation.group

    def window_of(self, layer_idx: int, name: str) -> Window:
        """Return the window of the rounded or of the exact entries of a layer."""
        return self.windows_of(layer_idx)[0 if name.startswith(_ROUNDED) else -1]

    def parts(self, layer_idx: int, name: str) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return the parts of a layer's rounded keys or values: the shape of each, and to how many tokens it belongs.
        """
        heads, size = self.specs[layer_idx].per_token[name]
        scale = ((heads, size), self.approximation.group) if name == "key" else ((heads, 1), 1)
        return {
            f"{_ROUNDED}{name}_codes": ((heads, size // 2), 1), f"{_ROUNDED}{name}_scales": scale,
            f"{_ROUNDED}{name}_lows": scale,
        }

    def round_groups(self, layer_idx: int, ends: Tensor, places: Tensor) -> None:
        """Round groups whose tokens are all written.

        Args:
            ends: [M] int64, slots of the exact entries of their last tokens.
            places: [M] int64, slots of the rounded entries of their last tokens.
        """
        tensors, size = self.layers[layer_idx], self.approximation.group
        before = torch.arange(1 - size, 1, device=ends.device)
        slots, of_tokens = ((last[:, None] + before).flatten() for last in (ends, places))
        for name, shape in self.specs[layer_idx].per_token.items():
            whole = tensors[name].index_select(0, slots).view(len(ends), size, *shape)
            rounded = self.approximation.keys(whole) if name == "key" else self.approximation.values(whole)
            for (part, (_, num_tokens)), numbers in zip(self.parts(layer_idx, name).items(), rounded, strict=True):
                where = of_tokens if num_tokens == 1 else places // size
                self._store(layer_idx, part, where, numbers.flatten(0, 1), num_tokens)

    def record(
        self, tables: Mapping[Window, list[int]], num_tokens: int, num_prompt: int, *, evictions: Evictions
    ) -> Tensor | None:
        """Return the parities of the codes of a sequence's complete groups; see `PagedCache.record`.

        Released blocks have none. Nor have the last tokens of a prompt in a group that ends within the completion: on a
        pack they stand once, and each completion rounds them in another group.
        """
        parities: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        on_device = self.tables_on_device(tables)
        size, places = self.approximation.group, torch.arange(num_tokens, device=on_device[self.windows[0]].device)
        is_own = (places < num_tokens // size * size) & ((places < num_prompt // size * size) | (places >= num_prompt))
        for layer_idx in self.layers:
            if len(self.windows_of(layer_idx)) == 1:
                continue
            blocks = on_device[self.windows_of(layer_idx)[0]]
            known = is_own & (blocks != EXPIRED).repeat_interleave(self.block_size)[:num_tokens]
            keys, values = (self._bits(layer_idx, name, blocks.clamp_min(0), num_tokens) for name in ("key", "value"))
            parities[layer_idx] = keys, values, known
        return record_of_layers(parities, 1 + max(self.specs)) if parities else None

    def _bits(self, layer_idx: int, name: str, blocks: Tensor, num_tokens: int) -> Tensor:
        """Return the parities of codes [num_tokens, K * D] in the blocks of a sequence."""
        codes = self.rows(layer_idx, f"{_ROUNDED}{name}_codes", blocks, num_tokens)
        codes = codes.unflatten(1, (self.specs[layer_idx].per_token[name][0], -1))
        return torch.cat((codes & 1, (codes >> 4) & 1), dim=-1).flatten(1)


class GroupedBatch(PagedBatch):
    """The tokens of one step over a `GroupedCache`: attention to old entries as they were rounded, and to new ones.

    Args:
        cache, slots, groups, states: see `PagedBatch`.
        ends: [M] int64, the step's tokens that end a group of the cache.
    """

    _cache: GroupedCache

    def __init__(
        self, cache: GroupedCache, slots: Mapping[Window, Tensor], groups: list[RowGroup], ends: Tensor,
        states: StepStates | None = None,
    ) -> None:
        super().__init__(cache, slots, groups, states)
        self._ends = ends
        self._old_blocks: dict[tuple[int, Window], Tensor] = {}

    def update(self, layer_idx: int, entries: Mapping[str, Tensor]) -> Iterator[tuple[RowGroup, dict[str, Tensor]]]:
        """Cache a layer's entries, and yield each group with all entries of its rows: rounded ones, then exact ones."""
        spec, cache = self._cache.specs[layer_idx], self._cache
        if not cache.approximation.rounds_window(spec.window):
            yield from super().update(layer_idx, entries)
            return
        window, exact_window = cache.windows_of(layer_idx)
        is_new = layer_idx not in cache.layers
        stored = cache.write(layer_idx, self._slots[exact_window], entries)
        if is_new or len(self._ends):
            cache.round_groups(layer_idx, self._slots[exact_window][self._ends], self._slots[window][self._ends])
        for index, group in enumerate(self._groups):
            joined = {}
            for name, entry in entries.items():
                rows, shape = group.positions.shape[0], entry.shape[1:]
                exact = self._gather(name, stored[name], group.blocks[exact_window]).view(rows, -1, *shape)
                blocks = self._blocks_with_old(index, window)
                num_old = blocks.shape[1] * cache.block_size
                joined[name] = self._memory(f"joined_{name}", (rows, num_old + exact.shape[1], *shape), entry)
                joined[name][:, num_old:] = exact
                self._read_rounded(layer_idx, name, blocks, joined[name][:, :num_old])
            yield group, joined

    def _read_rounded(self, layer_idx: int, name: str, blocks: Tensor, out: Tensor) -> None:
        """Write the rounded entries of blocks [R,B] into `out` [R, tokens of B blocks, K, D]."""
        size = self._cache.approximation.group
        numbers = out.unflatten(1, (-1, size))  # [R, groups, G, K, D]
        parts = [
            self._gather(part, self._cache.in_blocks(layer_idx, part), blocks.flatten())
            .view(*numbers.shape[:2], size // num_tokens, *shape)
            for part, (shape, num_tokens) in self._cache.parts(layer_idx, name).items()
        ]
        from_int4(Int4(*parts), numbers)

    def _blocks_with_old(self, index: int, window: Window) -> Tensor:
        """Return the blocks [R,B] in which a group's rows may see rounded entries."""
        key = (index, window)
        if key not in self._old_blocks:
            group, cache = self._groups[index], self._cache
            blocks = group.blocks[window].view(group.positions.shape[0], -1)
            if window not in group.first_keys:  # the last query is in the last block, and `recent` groups are exact
                newest = (1 + cache.approximation.recent) * cache.approximation.group
                blocks = blocks[:, : max(0, -(-(blocks.shape[1] * cache.block_size - newest) // cache.block_size))]
            self._old_blocks[key] = blocks.contiguous()
        return self._old_blocks[key]

    def _visible(self, index: int, window: Window) -> Tensor:
        """Return whether queries see keys, [R,1,Q,L]: first the rounded ones, then the exact ones."""
        groups, block_size = self._cache.approximation, self._cache.block_size
        assert window is None or isinstance(window, int), "groups are of layers that see all tokens, or the last ones"
        if not groups.rounds_window(window):
            return super()._visible(index, window)
        group = self._groups[index]
        positions = group.positions[:, None, :, None]
        num_exact = group.blocks[groups.exact_window].shape[0] // len(positions) * block_size
        num_old = self._blocks_with_old(index, window).shape[1] * block_size
        old, new = (
            self._key_positions(group, of, count) for of, count in ((window, num_old), (groups.exact_window, num_exact))
        )
        first_exact = (positions // groups.group - groups.recent) * groups.group
        visible = torch.cat((old < first_exact, (new >= first_exact) & (new <= positions)), dim=-1)
        if window is None:
            return visible
        keys = torch.cat((old.expand(len(positions), 1, 1, -1), new.expand(len(positions), 1, 1, -1)), dim=-1)
        return visible & (keys > positions - window)
