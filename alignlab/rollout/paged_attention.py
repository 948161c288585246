"""The paged cache and attention over it.

Shapes: N tokens of the step, R rows (sequences) of a group, Q queries a row, L keys a row, H heads, K kv heads,
G = H / K query heads that share a kv head, D head size.

The tokens of a step are flat, [N], sequence after sequence. For attention they fall into groups of rows with about the
same number of queries and keys, padded within the group: as a rule all sequences that continue by one token are one
group. Keys and values of a group are gathered from the cache by whole blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_MAX_BLOCK_DIAGONAL_HEADS = 8


class KVCache:
    """Keys, values and expert choices of every cached token; a layer's tensors are made when it first writes."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = 0
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # [num_blocks * block_size, K * D] each
        self.routing: Tensor | None = None  # [num_blocks * block_size, sparse layers, experts a token] int16

    def grow(self, num_blocks: int) -> None:
        """Have at least `num_blocks` blocks; what is cached is kept."""
        if num_blocks <= self.num_blocks:
            return
        layers = {
            index: (self._enlarged(keys, num_blocks), self._enlarged(values, num_blocks))
            for index, (keys, values) in self.layers.items()
        }
        routing = None if self.routing is None else self._enlarged(self.routing, num_blocks)
        self.num_blocks, self.layers, self.routing = num_blocks, layers, routing

    def release(self) -> None:
        """Give the memory back."""
        self.layers, self.routing, self.num_blocks = {}, None, 0

    def write(self, layer_idx: int, slots: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Put `key`, `value` [1,K,N,D] at `slots` [N]; returns the layer's tensors [num_blocks, block_size * K * D]."""
        if layer_idx not in self.layers:
            width = key.shape[1] * key.shape[3]
            # Zeros, because a masked key's value still meets a weight of 0, and 0 * nan is nan.
            self.layers[layer_idx] = (
                key.new_zeros(self.num_blocks * self.block_size, width),
                value.new_zeros(self.num_blocks * self.block_size, width),
            )
        keys, values = self.layers[layer_idx]
        keys.index_copy_(0, slots, key[0].transpose(0, 1).reshape(slots.shape[0], -1))
        values.index_copy_(0, slots, value[0].transpose(0, 1).reshape(slots.shape[0], -1))
        return keys.view(self.num_blocks, -1), values.view(self.num_blocks, -1)

    def write_routing(self, slots: Tensor, choices: Tensor) -> None:
        """Keep the experts chosen, [N, sparse layers, experts a token]."""
        if self.routing is None:
            self.routing = choices.new_full((self.num_blocks * self.block_size, *choices.shape[1:]), -1)
        self.routing.index_copy_(0, slots, choices)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy blocks, all at once: (from, to) of each."""
        stores = [store for layer in self.layers.values() for store in layer]
        stores += [self.routing] if self.routing is not None else []
        source, target = torch.tensor(pairs, device=stores[0].device).unbind(1)
        for store in stores:
            blocks = store.view(self.num_blocks, -1)
            blocks.index_copy_(0, target, blocks.index_select(0, source))

    def _enlarged(self, store: Tensor, num_blocks: int) -> Tensor:
        larger = store.new_zeros(num_blocks * self.block_size, *store.shape[1:])
        larger[: store.shape[0]] = store
        return larger


@dataclass
class RowGroup:
    """Rows that attend together; their tokens lie one after another.

    Attributes:
        start, end: their flat tokens.
        padding: [R*Q] int64, the flat token of each query, a short row's last one repeated; None if all have Q.
        kept: [end - start] int64, where the tokens are among the R*Q queries; None if all have Q.
        blocks: [R * L / block_size] int64, each row's blocks, short rows filled up with any.
        positions: [R,Q] int64.
    """

    start: int
    end: int
    padding: Tensor | None
    kept: Tensor | None
    blocks: Tensor
    positions: Tensor

    def queries(self, flat: Tensor) -> Tensor:
        """[N,H,D] -> [R,Q,H,D]"""
        queries = flat[self.start : self.end] if self.padding is None else flat.index_select(0, self.padding)
        return queries.view(*self.positions.shape, *flat.shape[1:])

    def unpadded(self, attended: Tensor) -> Tensor:
        """[R,Q,H,D] -> [end - start,H,D]"""
        flat = attended.flatten(0, 1)
        return flat if self.kept is None else flat.index_select(0, self.kept)


class PagedBatch:
    """The tokens of one step and where they go in the cache: the `layout` of the attention function."""

    def __init__(self, cache: KVCache, slots: Tensor, groups: list[RowGroup]) -> None:
        self._cache = cache
        self._slots = slots
        self._groups = groups
        self._masks: dict[tuple[int, int | None], Tensor] = {}
        self._rooms: dict[str, Tensor] = {}

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor,
        *, scaling: float, sliding_window: int | None, softcap: float | None,
    ) -> Tensor:
        """Cache `key`, `value` [1,K,N,D]; attention of `query` [1,H,N,D] to all before each token -> [1,N,H,D]."""
        keys, values = self._cache.write(layer_idx, self._slots, key, value)
        flat = query[0].transpose(0, 1)
        parts = []
        for index, group in enumerate(self._groups):
            rows = group.positions.shape[0]
            attended = _attention(
                group.queries(flat),
                self._gathered("key", keys, group).view(rows, -1, key.shape[1], key.shape[3]),
                self._gathered("value", values, group).view(rows, -1, value.shape[1], value.shape[3]),
                self._mask(index, sliding_window, flat.dtype, query.shape[1] // key.shape[1]),
                scaling=scaling, softcap=softcap,
            )
            parts.append(group.unpadded(attended))
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[None]

    def _gathered(self, name: str, store: Tensor, group: RowGroup) -> Tensor:
        """The group's blocks of `store`, in memory that all layers use in turn: it stays in the processor's cache."""
        shape = (group.blocks.shape[0], store.shape[1])
        room = self._rooms.get(name)
        if room is None or room.shape != shape:
            room = self._rooms[name] = store.new_empty(shape)
        return torch.index_select(store, 0, group.blocks, out=room)

    def _mask(self, index: int, window: int | None, dtype: torch.dtype, shared: int) -> Tensor:
        """[R,1,G*Q,L], 0 where a query sees a key and -inf elsewhere; the same for all layers with this window."""
        if (index, window) not in self._masks:
            group = self._groups[index]
            positions = group.positions[:, None, :, None]
            num_keys = group.blocks.shape[0] // positions.shape[0] * self._cache.block_size
            keys = torch.arange(num_keys, device=positions.device)
            seen = keys <= positions
            if window is not None:
                seen &= keys > positions - window
            mask = torch.zeros(seen.shape, dtype=dtype, device=positions.device).masked_fill_(~seen, -torch.inf)
            single = mask.shape[2] == 1
            self._masks[index, window] = mask.expand(-1, -1, shared, -1) if single else mask.repeat(1, 1, shared, 1)
        return self._masks[index, window]


def _attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, softcap: float | None
) -> Tensor:
    """Attention of query [R,Q,H,D] to key, value [R,L,K,D] under mask [R,1,G*Q,L] -> [R,Q,H,D]."""
    narrow = query.shape[1] == 1 and key.shape[2] <= _MAX_BLOCK_DIAGONAL_HEADS
    if narrow and key.dtype == torch.bfloat16 and not key.is_cuda:
        return _block_diagonal_attention(query, key, value, mask, scaling=scaling, softcap=softcap)
    return _folded_attention(query, key, value, mask, scaling=scaling, softcap=softcap)


def _folded_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, softcap: float | None
) -> Tensor:
    """The G heads that share a kv head become G more queries of it: keys are read once and never repeated."""
    rows, count, heads, size = query.shape
    kv_heads = key.shape[2]
    shared = heads // kv_heads
    folded = query.view(rows, count, kv_heads, shared, size).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, kv_heads, shared * count, size)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if softcap is None:
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        scores = _capped(folded.float() @ key.float().transpose(-1, -2) * scaling, softcap)
        output = (scores + mask).softmax(-1).to(value.dtype) @ value
    output = output.view(rows, kv_heads, shared, count, size).permute(0, 3, 1, 2, 4)
    return output.reshape(rows, count, heads, size)


def _block_diagonal_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, *, scaling: float, softcap: float | None
) -> Tensor:
    """One query a row, all its heads in one product: each is put beside zeros for the other heads' keys.

    K times the arithmetic, in one matrix product a row where torch's attention on a CPU does K * R tiny ones in a
    bfloat16 layout of their own: 1.3 to 8 times as fast for up to 8 kv heads.
    """
    rows, _, heads, size = query.shape
    kv_heads = key.shape[2]
    spread = query.new_zeros(rows, kv_heads, heads // kv_heads, kv_heads, size)
    spread.diagonal(dim1=1, dim2=3).copy_(query.view(rows, kv_heads, -1, size).permute(0, 2, 3, 1))
    scores = torch.bmm(spread.view(rows, heads, -1), key.flatten(2).transpose(1, 2)).float().mul_(scaling)
    if softcap is not None:
        scores = _capped(scores, softcap)
    weights = scores.add_(mask[:, 0, :1]).softmax(-1).to(value.dtype)
    mixed = torch.bmm(weights, value.flatten(2)).view(rows, kv_heads, -1, kv_heads, size)
    return mixed.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(rows, 1, heads, size)


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap)
