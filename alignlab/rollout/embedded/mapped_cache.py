"""A cache whose blocks lie in a file, and attention that reads a few of them at a time.

What is kept is exact. Where one reading does not do, the softmax is over several: each has the largest score m, the sum
l of exp(score - m), and the values weighted by these, o. Two are joined by

    m = max(m1, m2),  l = l1 exp(m1 - m) + l2 exp(m2 - m),  o = o1 exp(m1 - m) + o2 exp(m2 - m)

and the result is o / l. Reference: Milakov & Gimelshein (2018), arXiv:1805.02867, Section 3.1; with values, Dao et al.
(2022), arXiv:2205.14135, Section 3.1.

Shapes: R rows, Q queries a row, C keys a row of one reading, K kv heads, G query heads that share one, D size of a key,
V size of a value.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from alignlab.config.kv_cache import MmapCache
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.sink_window import sees
from alignlab.rollout.embedded.block_pools import Window
from alignlab.rollout.embedded.mapped_file import MappedFile, page_bytes, touched_bytes
from alignlab.rollout.embedded.paged_attention import PagedBatch, RowGroup, attention
from alignlab.rollout.embedded.paged_cache import PagedCache

_GIB = 2**30
_READING_BYTES = 16 * 2**20
"""Of keys and values, and of scores, in one reading."""


class MappedCache(PagedCache):
    """Keys and values in a file; expert choices in memory.

    Args:
        settings: the folder and the sizes.
        dtype: of the model.
        specs, block_size, records_routing: see `PagedCache`.
    """

    def __init__(
        self, specs: Mapping[int, LayerCacheSpec], block_size: int, settings: MmapCache, dtype: torch.dtype,
        *, records_routing: bool = False,
    ) -> None:
        super().__init__(specs, block_size, records_routing=records_routing)
        self._settings = settings
        self._dtype = dtype
        self._file: MappedFile | None = None
        self.resident_bytes = int(settings.resident_gib * _GIB)

    def max_file_bytes(self) -> int:
        """Return the bytes that the file may have: `max_gib`, or what it has and half of the room beside it."""
        if self._settings.max_gib is not None:
            return int(self._settings.max_gib * _GIB)
        held = 0 if self._file is None else self._file.num_bytes
        return held + shutil.disk_usage(self._settings.folder).free // 2

    def resize(self, num_blocks: Mapping[Window, int], *, num_more: int = 0) -> None:
        """Drop all entries, and reserve a file for `num_blocks` blocks; see `PagedCache.resize`.

        Raises:
            RolloutError: the disk has no room.
        """
        super().resize(num_blocks, num_more=num_more)
        self._file = None  # its room is free again when its last tensor is gone, which was above
        num_bytes = sum(
            page_bytes(tokens * self.block_size * self._dtype.itemsize * numel)
            for spec in self.specs.values() for tokens in [self.total_blocks[spec.window]]
            for numel in _numbers(spec)
        )
        if num_bytes:
            self._file = MappedFile(self._settings.folder, num_bytes, self.resident_bytes)

    def tensors_of(self, window: Window) -> list[Tensor]:
        """Return all that is kept in the blocks of a window; see `PagedCache.tensors_of`."""
        if self._file is not None:
            self._file.touch_all()
        return super().tensors_of(window)

    def touch(self, layer_idx: int, name: str, blocks: Tensor) -> None:
        """Take note that blocks [n] of a tensor are read next."""
        assert self._file is not None
        self._file.touch(touched_bytes(blocks, self.in_blocks(layer_idx, name)[0].nbytes))

    def _store(self, layer_idx: int, name: str, places: Tensor, entries: Tensor, num_tokens: int = 1) -> Tensor:
        assert self._file is not None
        self._file.touch(touched_bytes(places // self.block_size, self.block_size * entries[0].nbytes))
        return super()._store(layer_idx, name, places, entries, num_tokens)

    def _zeros(self, like: Tensor, num_places: int, numel: int) -> Tensor:
        assert self._file is not None
        return self._file.zeros((num_places, numel), like.dtype)


def _numbers(spec: LayerCacheSpec) -> list[int]:
    """Return the numbers of a token under each name."""
    return [int(torch.Size(shape).numel()) for shape in spec.per_token.values()]


class Reading(NamedTuple):
    """A softmax over some keys, not divided yet.

    Attributes:
        top: [..., queries] largest score; the lowest finite number where no key is seen.
        total: [..., queries] sum of exp(score - top).
        output: [..., queries, V] values weighted by exp(score - top).
    """

    top: Tensor
    total: Tensor
    output: Tensor


def read(scores: Tensor, value: Tensor) -> Reading:
    """Return the softmax over the keys of scores [..., queries, C], -inf where hidden, and values [..., C, V]."""
    top = scores.amax(-1).clamp_min(torch.finfo(scores.dtype).min)
    weights = (scores - top[..., None]).exp_()
    return Reading(top, weights.sum(-1), (weights.to(value.dtype) @ value).to(scores.dtype))


def joined(one: Reading, other: Reading) -> Reading:
    """Return the softmax over the keys of both; see the top of this module."""
    top = torch.maximum(one.top, other.top)
    first, second = (one.top - top).exp(), (other.top - top).exp()
    return Reading(
        top, one.total * first + other.total * second,
        one.output * first[..., None] + other.output * second[..., None],
    )


class MappedBatch(PagedBatch):
    """The tokens of one step over a `MappedCache`, of which attention reads a few blocks at a time."""

    _cache: MappedCache

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor | None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:
        """Cache and attend; see `PagedBatch.attend`."""
        flat, spec = query[0].transpose(0, 1), self._cache.specs[layer_idx]
        assert sliding_window == spec.window, f"layer {layer_idx} has declared a window of {spec.window}"
        entries = spec.entries(key[0].transpose(0, 1), None if value is None else value[0].transpose(0, 1))
        self._cache.write(layer_idx, self._slots[spec.window], entries)
        outputs = []
        for index, group in enumerate(self._groups):
            queries, blocks = group.queries(flat), group.blocks[spec.window].view(len(group.positions), -1)
            width = self._columns(queries, entries)
            if blocks.shape[1] <= width:
                cached = self._read_blocks(layer_idx, blocks, entries)
                mask = self._mask(index, spec.window, flat.dtype, query.shape[1] // key.shape[1])
                output = attention(
                    queries, *spec.key_and_value(cached), mask, scaling=scaling, softcap=softcap, sinks=sinks
                )
            else:
                output = self._attend_by_readings(
                    layer_idx, group, queries, entries, width, scaling=scaling, softcap=softcap, sinks=sinks
                )
            outputs.append(group.unpadded(output))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _attend_by_readings(
        self, layer_idx: int, group: RowGroup, queries: Tensor, entries: Mapping[str, Tensor], width: int,
        *, scaling: float, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:
        """Return the attention [R,Q,H,V] of queries [R,Q,H,D], by readings of `width` blocks a row."""
        spec, size = self._cache.specs[layer_idx], self._cache.block_size
        rows, count, heads, _ = queries.shape
        kv_heads = next(iter(entries.values())).shape[1]
        exact = torch.promote_types(queries.dtype, torch.float32)
        folded = queries.view(rows, count, kv_heads, -1, queries.shape[3]).permute(0, 2, 3, 1, 4).to(exact)
        folded = folded.reshape(rows, kv_heads, -1, queries.shape[3])  # [R,K,G*Q,D]
        blocks = group.blocks[spec.window].view(rows, -1)
        places = self._key_positions(group, spec.window, blocks.shape[1] * size)
        total: Reading | None = None
        for columns in range(0, blocks.shape[1], width):
            cached = self._read_blocks(layer_idx, blocks[:, columns : columns + width], entries)
            key, value = (x.transpose(1, 2) for x in spec.key_and_value(cached))  # [R,K,C,...]
            scores = folded @ key.to(exact).transpose(-1, -2) * scaling
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            keys = places[..., columns * size : columns * size + key.shape[-2]]
            hidden = ~sees(spec.window, group.positions[:, None, :, None], keys)[:, :, None]  # [R,1,1,Q,C]
            scores.view(rows, kv_heads, -1, count, key.shape[2]).masked_fill_(hidden, -torch.inf)
            new = read(scores, value)
            total = new if total is None else joined(total, new)
        assert total is not None
        if sinks is not None:  # one more key of each head, whose value is 0
            sink = sinks.to(exact).view(1, kv_heads, -1, 1).expand(rows, -1, -1, count).flatten(2)
            total = joined(total, Reading(sink, torch.ones_like(sink), torch.zeros_like(total.output)))
        output = (total.output / total.total[..., None]).view(rows, kv_heads, -1, count, total.output.shape[-1])
        return output.permute(0, 3, 1, 2, 4).reshape(rows, count, heads, -1).to(queries.dtype)

    def _read_blocks(self, layer_idx: int, blocks: Tensor, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a layer's entries [R, tokens, ...] by name in blocks [R,B], until others are read."""
        flat, cached = blocks.reshape(-1), {}
        for name, entry in entries.items():
            self._cache.touch(layer_idx, name, flat)
            gathered = self._gather(name, self._cache.in_blocks(layer_idx, name), flat)
            cached[name] = gathered.view(len(blocks), -1, *entry.shape[1:])
        return cached

    def _columns(self, queries: Tensor, entries: Mapping[str, Tensor]) -> int:
        """Return the blocks a row in one reading."""
        rows, count, heads, _ = queries.shape
        of_keys = rows * sum(entry[0].nbytes for entry in entries.values())
        of_scores = rows * count * heads * torch.promote_types(queries.dtype, torch.float32).itemsize
        most = min(_READING_BYTES, self._cache.resident_bytes // 4)
        return max(1, most // (max(of_keys, of_scores) * self._cache.block_size))
