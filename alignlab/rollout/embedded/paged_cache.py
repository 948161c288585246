"""The paged cache: what every layer keeps of every token, in blocks of consecutive tokens.

A slot is the place of one token in the cache: `block * block_size + position in the block`. Layers of one window share
their blocks' numbers, and so their slots; see `block_pools`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.kv_approximation.eviction_record import Evictions
from alignlab.models.kv_approximation.protocol import KVApproximation
from alignlab.rollout.embedded.block_pools import Window
from alignlab.transfer import to_device


class PagedCache:
    """Tensors by layer and name, allocated when a layer first writes, and the expert choices of every token.

    Args:
        specs: shapes that each layer keeps of a token, by `layer_idx`; layers that keep none are left out.
        block_size: tokens in a block.
        approximation: what is kept of keys and values; None keeps them as they are. A subclass names its own kind.
        records_routing: expert choices of every token are kept beside what the layers keep.

    Attributes:
        specs: of the layers that keep entries of tokens.
        windows: of all that these layers keep, each once; with None for the expert choices, and where there is no such
            layer.
        tokens_of_group: consecutive tokens that are rounded together, once the last of them is known; 1 for none.
        num_blocks: of sequences, by window.
        total_blocks: of these and of what steps in place need beside them, by window.
        layers: [slots, numbers kept of a token] by layer and name, from the layer's first tokens on.
        routing: [slots, MoE layers, experts a token] int16; None before the first write of a sparse model.
    """

    def __init__(
        self, specs: Mapping[int, LayerCacheSpec], block_size: int, approximation: KVApproximation | None = None,
        *, records_routing: bool = False,
    ) -> None:
        self.block_size = block_size
        self.tokens_of_group = 1
        self.approximation = approximation
        self.specs = {layer_idx: spec for layer_idx, spec in specs.items() if spec.per_token}
        records = (None,) if records_routing or not self.specs else ()
        windows = [*records, *(window for layer_idx in self.specs for window in self.windows_of(layer_idx))]
        self.windows: tuple[Window, ...] = tuple(dict.fromkeys(windows))
        self.num_blocks = self.total_blocks = dict.fromkeys(self.windows, 0)
        self.layers: dict[int, dict[str, Tensor]] = {}
        self.routing: Tensor | None = None

    def windows_of(self, layer_idx: int) -> tuple[Window, ...]:
        """Return the windows of what a layer keeps, the widest first."""
        spec = self.specs[layer_idx]
        return (spec.window,) if self.approximation is None else self.approximation.windows(spec)

    def window_of(self, layer_idx: int, name: str) -> Window:
        """Return the window of what a layer keeps under a name."""
        return self.windows_of(layer_idx)[0]

    def block_bytes(self, dtype: torch.dtype) -> dict[Window, int]:
        """Return the bytes of one block, over all layers of a window, by window; expert choices are not counted.

        Args:
            dtype: of the model.
        """
        total = dict.fromkeys(self.windows, 0)
        for spec in self.specs.values():
            for window, num_bytes in block_bytes(spec, dtype, self.block_size, self.approximation).items():
                total[window] += num_bytes
        return total

    def max_file_bytes(self) -> int | None:
        """Return the bytes that blocks may take of a disk; None for blocks in memory."""
        return None

    @property
    def addressable_blocks(self) -> int:
        """Blocks with which every tensor of a layer, with one block more, has under 2^31 numbers."""
        shapes = [shape for spec in self.specs.values() for shape in spec.per_token.values()]
        widest = max((math.prod(shape) for shape in shapes), default=1)
        return (2**31 - 1) // (self.block_size * widest) - 1

    def resize(self, num_blocks: Mapping[Window, int], *, num_more: int = 0) -> None:
        """Drop all entries, and have `num_blocks` blocks, which a layer allocates when it first writes.

        What is held is freed first: old and new blocks together may not fit in memory.

        Args:
            num_blocks: blocks of sequences, by window.
            num_more: blocks after these, in each window, that no sequence uses.
        """
        self.layers, self.routing = {}, None
        self.num_blocks = dict(num_blocks)
        self.total_blocks = {window: count + num_more for window, count in num_blocks.items()}

    def in_blocks(self, layer_idx: int, name: str) -> Tensor:
        """Return the whole tensor of a name, [blocks, numbers of a block]."""
        return self.layers[layer_idx][name].view(self.total_blocks[self.window_of(layer_idx, name)], -1)

    def write(self, layer_idx: int, slots: Tensor, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Store a layer's entries of N tokens.

        Args:
            layer_idx: number of the layer.
            slots: [N] int64, where each token is stored.
            entries: [N, ...] by name, of the shapes that the layer declared.

        Returns:
            The layer's whole tensors by the names in `layers`, [blocks, numbers of a block].
        """
        self.check(layer_idx, entries)
        return {name: self._store(layer_idx, name, slots, entry) for name, entry in entries.items()}

    def check(self, layer_idx: int, entries: Mapping[str, Tensor]) -> None:
        """Check that entries of N tokens have the shapes that the layer declared."""
        spec, shapes = self.specs[layer_idx], {name: tuple(entry.shape[1:]) for name, entry in entries.items()}
        assert shapes == spec.per_token, f"layer {layer_idx} keeps {spec.per_token}, not {shapes}"

    def _store(self, layer_idx: int, name: str, places: Tensor, entries: Tensor, num_tokens: int = 1) -> Tensor:
        """Store entries of a name, each of which belongs to `num_tokens` consecutive tokens.

        Args:
            places: [N] int64, a slot divided by `num_tokens`.
            entries: [N, ...].

        Returns:
            The whole tensor, [blocks, numbers of a block].
        """
        tensors = self.layers.setdefault(layer_idx, {})
        total_blocks = self.total_blocks[self.window_of(layer_idx, name)]
        if name not in tensors:
            num_places = total_blocks * self.block_size // num_tokens
            tensors[name] = self._zeros(entries, num_places, math.prod(entries.shape[1:]))
        tensors[name].index_copy_(0, places, entries.reshape(places.shape[0], math.prod(entries.shape[1:])))
        return tensors[name].view(total_blocks, -1)

    def _zeros(self, like: Tensor, num_places: int, numel: int) -> Tensor:
        """Return the tensor of a name before its first entries, [num_places, numel].

        Zeros, because the value of a masked key is multiplied by a weight of 0, and 0 * nan is nan.
        """
        return like.new_zeros(num_places, numel)

    def write_routing(self, slots: Tensor, choices: Tensor) -> None:
        """Store the experts chosen for N tokens, [N, MoE layers, experts a token], at slots without a window."""
        if self.routing is None:
            self.routing = choices.new_full((self.total_blocks[None] * self.block_size, *choices.shape[1:]), -1)
        self.routing.index_copy_(0, slots, choices)

    def record(
        self, tables: Mapping[Window, list[int]], num_tokens: int, num_prompt: int, *, evictions: Evictions
    ) -> Tensor | None:
        """Return what a replay of the approximation needs of a sequence's tokens, [num_tokens, L, bytes] uint8.

        None where it needs nothing. See `alignlab.models.kv_approximation.record`.

        Args:
            tables: blocks of the sequence, by window.
            num_tokens: that were computed.
            num_prompt: those of them that sequences of one request share.
            evictions: what stayed of the sequence's tokens, where the cache has a budget.
        """
        return None

    def tables_on_device(self, tables: Mapping[Window, list[int]]) -> dict[Window, Tensor]:
        """Return the blocks of a sequence by window, [blocks] int64, beside the entries, by one copy."""
        device = next(tensor.device for layer in self.layers.values() for tensor in layer.values())
        on_host = [torch.tensor(table, dtype=torch.int64) for table in tables.values()]
        return dict(zip(tables, to_device(on_host, device), strict=True))

    def rows(self, layer_idx: int, name: str, blocks: Tensor, num_tokens: int) -> Tensor:
        """Return the entries of a name of a sequence's first tokens, [num_tokens, numbers of a token].

        Args:
            blocks: of the sequence; any block in the place of one that was released.
        """
        stored = self.layers[layer_idx][name].unflatten(0, (-1, self.block_size))
        return stored.index_select(0, blocks).flatten(0, 1)[:num_tokens]

    def copy(self, window: Window, pairs: Tensor) -> None:
        """Copy whole blocks of the layers of a window, all at once: (source, target) of each, [copies, 2] int64."""
        source, target = pairs.unbind(1)
        for blocks in self.tensors_of(window):
            blocks.index_copy_(0, target, blocks.index_select(0, source))

    def tensors_of(self, window: Window) -> list[Tensor]:
        """Return all that is kept in the blocks of a window, [blocks, numbers of a block]: of a block that is all."""
        tensors = [
            tensor for layer_idx, layer in self.layers.items() for name, tensor in layer.items()
            if self.window_of(layer_idx, name) == window
        ]
        tensors += [self.routing] if window is None and self.routing is not None else []
        return [tensor.view(self.total_blocks[window], -1) for tensor in tensors]


def block_bytes(
    spec: LayerCacheSpec, dtype: torch.dtype, block_size: int, approximation: KVApproximation | None
) -> dict[Window, int]:
    """Return the bytes of a block of a layer's tokens, by window.

    Args:
        dtype: of the model.
        block_size: tokens in a block.
        approximation: of keys and values; None keeps them as they are.
    """
    if approximation is not None:
        return approximation.block_bytes(spec, dtype, block_size)
    return {spec.window: dtype.itemsize * spec.token_numel * block_size}
