"""Attention over the paged cache.

Shapes: N tokens of the step, R rows (sequences) of a group, Q queries a row, L cached tokens a row, H heads,
K kv heads, G = H / K query heads that share a kv head, D size of a query's or key's head, V size of a value's head.

The tokens of a step are flat, [N], sequence after sequence. For attention they are divided into groups of rows with
about as many queries and keys, padded within the group: usually all sequences that continue by one token are one group.
The cached entries of a group are gathered by whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from alignlab.models.sink_window import sees
from alignlab.rollout.embedded.block_pools import Window, sink_blocks
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.state_cache import StateBatch, StepStates

_MAX_BLOCK_DIAGONAL_HEADS = 8


@dataclass
class RowGroup:
    """Rows that attend together; their tokens are consecutive.

    Attributes:
        start, end: range of the group's tokens among the step's.
        padding: [R*Q] int64, the step's token that stands at each query; a short row repeats its last token. None if
            every row has Q tokens.
        unpadding: [end - start] int64, the place of each token among the R*Q queries; None if every row has Q tokens.
        positions: [R,Q] int64, position of each query in its sequence.
        blocks: [R * L / block_size] int64, by the window of the layers, the blocks of each row from the first one that
            it sees; a short row is filled up with any block.
        first_keys: [R] int64, by window, tokens before these blocks that a row leaves out, or between its sinks' blocks
            and the others; 0 for windows that it lacks.
    """

    start: int
    end: int
    padding: Tensor | None
    unpadding: Tensor | None
    positions: Tensor
    blocks: dict[Window, Tensor]
    first_keys: dict[Window, Tensor]

    def queries(self, flat: Tensor) -> Tensor:
        """Return the group's queries, [N,H,D] -> [R,Q,H,D]."""
        queries = flat[self.start : self.end] if self.padding is None else flat.index_select(0, self.padding)
        return queries.view(*self.positions.shape, *flat.shape[1:])

    def unpadded(self, output: Tensor) -> Tensor:
        """Return the output of the group's tokens without padding, [R,Q,...] -> [end - start,...]."""
        flat = output.flatten(0, 1)
        return flat if self.unpadding is None else flat.index_select(0, self.unpadding)


class PagedBatch(StateBatch):
    """The tokens of one step and their slots in the cache: the `layout` that layers are given.

    A layer that keeps keys and values, or latents, calls `attend`; one that keeps other entries of tokens builds its
    attention on `update`; one that keeps entries of sequences reads `states`.
    """

    keeps_latents = True

    def __init__(
        self, cache: PagedCache, slots: Mapping[Window, Tensor], groups: list[RowGroup],
        states: StepStates | None = None,
    ) -> None:
        super().__init__(states)
        self._cache = cache
        self._slots = slots
        self._groups = groups
        self._masks: dict[tuple[int, Window, int], Tensor] = {}
        self._scratch: dict[str, Tensor] = {}

    def update(self, layer_idx: int, entries: Mapping[str, Tensor]) -> Iterator[tuple[RowGroup, dict[str, Tensor]]]:
        """Cache a layer's entries of the step's tokens, and yield each group with all entries of its rows.

        Args:
            layer_idx: number of the layer.
            entries: [N, ...] by name, of the shapes in the layer's cache spec.

        Yields:
            The group, and its entries [R, L, ...] by name, of the tokens that the layer's window reaches. They are
            overwritten when the next group is asked for.
        """
        window = self._cache.windows_of(layer_idx)[0]
        stored = self._cache.write(layer_idx, self._slots[window], entries)
        for group in self._groups:
            rows = group.positions.shape[0]
            yield group, {
                name: self._read(name, stored, group.blocks[window], entry).view(rows, -1, *entry.shape[1:])
                for name, entry in entries.items()
            }

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor | None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:
        """Cache `key` [1,K,N,D] and `value` [1,K,N,V], and attend with `query` [1,H,N,D] to all tokens up to each.

        Args:
            value: None for a layer that keeps latents; see `PagedLayout`.

        Returns:
            [1,N,H,V]
        """
        flat, spec = query[0].transpose(0, 1), self._cache.specs[layer_idx]
        assert sliding_window == spec.window, f"layer {layer_idx} has declared a window of {spec.window}"
        entries = spec.entries(key[0].transpose(0, 1), None if value is None else value[0].transpose(0, 1))
        outputs = []
        for index, (group, cached) in enumerate(self.update(layer_idx, entries)):
            output = attention(
                group.queries(flat), *spec.key_and_value(cached),
                self._mask(index, self._cache.windows_of(layer_idx)[0], flat.dtype, query.shape[1] // key.shape[1]),
                scaling=scaling, softcap=softcap, sinks=sinks,
            )
            outputs.append(group.unpadded(output))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _read(self, name: str, stored: Mapping[str, Tensor], blocks: Tensor, entry: Tensor) -> Tensor:
        """Return the entries of a name in `blocks`, [blocks, numbers of a block], as attention reads them.

        Args:
            stored: the layer's whole tensors.
            entry: one like those entries, [N, ..., D].
        """
        return self._gather(name, stored[name], blocks)

    def _gather(self, name: str, tensor: Tensor, blocks: Tensor) -> Tensor:
        """Return the rows `blocks` of `tensor`, in memory that all layers use in turn."""
        return torch.index_select(tensor, 0, blocks, out=self._memory(name, (len(blocks), tensor.shape[1]), tensor))

    def _memory(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return memory for a tensor of a name, which layers use in turn: it then stays in the processor's cache."""
        scratch, numel = self._scratch.get(name), math.prod(shape)
        if scratch is None or scratch.numel() < numel or scratch.dtype != like.dtype:
            scratch = self._scratch[name] = like.new_empty(numel)
        return scratch[:numel].view(shape)

    def _mask(self, index: int, window: Window, dtype: torch.dtype, shared: int) -> Tensor:
        """Return [R,1,G*Q,L], 0 where a query sees a key and -inf elsewhere; layers with the same window share it."""
        key = (index, window, shared)
        if key not in self._masks:
            visible = self._visible(index, window)
            mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
            # The only query of a row needs no copies: one row of the mask is broadcast.
            single = mask.shape[2] == 1
            self._masks[key] = mask.expand(-1, -1, shared, -1) if single else mask.repeat(1, 1, shared, 1)
        return self._masks[key]

    def _visible(self, index: int, window: Window) -> Tensor:
        """Return whether queries of a group see keys, [R,1,Q,L]."""
        group = self._groups[index]
        positions = group.positions[:, None, :, None]
        num_keys = group.blocks[window].shape[0] // positions.shape[0] * self._cache.block_size
        return sees(window, positions, self._key_positions(group, window, num_keys))

    def _key_positions(self, group: RowGroup, window: Window, count: int) -> Tensor:
        """Return the positions of the first `count` keys in a group's blocks, [R or 1,1,1,count]."""
        keys = torch.arange(count, device=group.positions.device)[None, None, None]
        if window not in group.first_keys:
            return keys
        left_out = group.first_keys[window][:, None, None, None]
        num_sinks = sink_blocks(window, self._cache.block_size) * self._cache.block_size
        return torch.where(keys < num_sinks, keys, keys + left_out)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
    *, scaling: float, softcap: float | None, sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention of query [R,Q,H,D] to key [R,L,K,D] and value [R,L,K,V], [R,Q,H,V]; mask is [R,1,G*Q,L]."""
    narrow = query.shape[1] == 1 and key.shape[2] <= _MAX_BLOCK_DIAGONAL_HEADS
    if narrow and key.dtype == torch.bfloat16 and not key.is_cuda:
        return _block_diagonal_attention(query, key, value, mask, scaling=scaling, softcap=softcap, sinks=sinks)
    return _folded_attention(query, key, value, mask, scaling=scaling, softcap=softcap, sinks=sinks)


def _folded_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
    *, scaling: float, softcap: float | None, sinks: Tensor | None = None,
) -> Tensor:
    """Fold the G heads that share a kv head into G times as many queries of it, so that no key is repeated."""
    rows, count, heads, size = query.shape
    kv_heads = key.shape[2]
    shared = heads // kv_heads
    folded = query.view(rows, count, kv_heads, shared, size).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(rows, kv_heads, shared * count, size)
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if softcap is None and sinks is None:
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    else:
        exact = torch.promote_types(query.dtype, torch.float32)
        scores = folded.to(exact) @ key.to(exact).transpose(-1, -2) * scaling
        scores = (scores if softcap is None else _capped(scores, softcap)) + mask
        of_query = None if sinks is None else sinks.view(1, kv_heads, shared, 1).expand(-1, -1, -1, count).flatten(2)
        output = softmax_with_sinks(scores, of_query).to(value.dtype) @ value
    output = output.view(rows, kv_heads, shared, count, -1).permute(0, 3, 1, 2, 4)
    return output.reshape(rows, count, heads, -1)


def _block_diagonal_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
    *, scaling: float, softcap: float | None, sinks: Tensor | None = None,
) -> Tensor:
    """Attend with one query a row, all heads in one product: zeros stand for the keys of other heads.

    It does K times the arithmetic in one matrix product a row. Torch's attention on a CPU does K * R tiny products in a
    bfloat16 layout of its own instead: this is 1.3 to 8 times as fast for up to 8 kv heads.
    """
    rows, _, heads, size = query.shape
    kv_heads = key.shape[2]
    spread = query.new_zeros(rows, kv_heads, heads // kv_heads, kv_heads, size)
    spread.diagonal(dim1=1, dim2=3).copy_(query.view(rows, kv_heads, -1, size).permute(0, 2, 3, 1))
    scores = torch.bmm(spread.view(rows, heads, -1), key.flatten(2).transpose(1, 2)).float().mul_(scaling)
    if softcap is not None:
        scores = _capped(scores, softcap)
    weights = softmax_with_sinks(scores.add_(mask[:, 0, :1]), None if sinks is None else sinks[None]).to(value.dtype)
    mixed = torch.bmm(weights, value.flatten(2)).view(rows, kv_heads, -1, kv_heads, value.shape[3])
    return mixed.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(rows, 1, heads, -1)


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Return the softmax over the last dimension of scores [..., L]; sinks [...], if any, take their share of it."""
    if sinks is None:
        return scores.softmax(-1)
    joined = sinks.to(scores.dtype)[..., None].expand(*scores.shape[:-1], 1)
    return torch.cat((scores, joined), dim=-1).softmax(-1)[..., :-1]


def _capped(scores: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(scores / softcap)
