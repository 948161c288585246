"""The paged cache: what every layer keeps of every token, in blocks of consecutive tokens.

A slot is the place of one token in the cache: `block * block_size + position in the block`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from alignlab.errors import ConfigError
from alignlab.models.cache_spec import LayerCacheSpec


class PagedCache:
    """Tensors by layer and name, allocated when a layer first writes, and the expert choices of every token.

    Args:
        specs: shapes that each layer keeps of a token, by `layer_idx`.
        block_size: tokens in a block.

    Raises:
        ConfigError: a layer keeps a state of each sequence, which cannot be cut into blocks of tokens.

    Attributes:
        specs: as given.
        layers: [slots, numbers kept of a token] by layer and name.
        routing: [slots, MoE layers, experts a token] int16; None before the first write of a sparse model.
    """

    def __init__(self, specs: Mapping[int, LayerCacheSpec], block_size: int) -> None:
        for layer_idx, spec in specs.items():
            if spec.per_sequence:
                raise ConfigError(
                    f"layer {layer_idx} keeps a state of each sequence ({', '.join(spec.per_sequence)}), and the "
                    "embedded engine caches entries of tokens alone; use rollout.engine: vllm"
                )
        self.block_size = block_size
        self.num_blocks = self._total_blocks = 0
        self.layers: dict[int, dict[str, Tensor]] = {}
        self.routing: Tensor | None = None
        self.specs = dict(specs)
        self._shapes = {layer_idx: dict(spec.per_token) for layer_idx, spec in specs.items()}

    @property
    def block_numel(self) -> int:
        """Numbers in one block, over all layers."""
        return self.block_size * sum(math.prod(shape) for shapes in self._shapes.values() for shape in shapes.values())

    @property
    def addressable_blocks(self) -> int:
        """Blocks with which every tensor of a layer, with one block more, has under 2^31 numbers."""
        widest = max(math.prod(shape) for shapes in self._shapes.values() for shape in shapes.values())
        return (2**31 - 1) // (self.block_size * widest) - 1

    def resize(self, num_blocks: int, *, num_more: int = 0) -> None:
        """Drop all entries, and have `num_blocks` blocks, which a layer allocates when it first writes.

        What is held is freed first: old and new blocks together may not fit in memory.

        Args:
            num_blocks: blocks of sequences.
            num_more: blocks after these that no sequence uses.
        """
        self.layers, self.routing = {}, None
        self.num_blocks, self._total_blocks = num_blocks, num_blocks + num_more

    def write(self, layer_idx: int, slots: Tensor, entries: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Store a layer's entries of N tokens.

        Args:
            layer_idx: number of the layer.
            slots: [N] int64, where each token is stored.
            entries: [N, ...] by name, of the shapes that the layer declared.

        Returns:
            The layer's whole tensors by name, [blocks, numbers of a block].
        """
        shapes = {name: tuple(entry.shape[1:]) for name, entry in entries.items()}
        assert shapes == self._shapes[layer_idx], f"layer {layer_idx} keeps {self._shapes[layer_idx]}, not {shapes}"
        tensors = self.layers.get(layer_idx)
        if tensors is None:
            # Zeros, because the value of a masked key is multiplied by a weight of 0, and 0 * nan is nan.
            tensors = self.layers[layer_idx] = {
                name: entry.new_zeros(self._total_blocks * self.block_size, math.prod(entry.shape[1:]))
                for name, entry in entries.items()
            }
        for name, entry in entries.items():
            tensors[name].index_copy_(0, slots, entry.reshape(slots.shape[0], -1))
        return {name: tensor.view(self._total_blocks, -1) for name, tensor in tensors.items()}

    def write_routing(self, slots: Tensor, choices: Tensor) -> None:
        """Store the experts chosen for N tokens, [N, MoE layers, experts a token]."""
        if self.routing is None:
            self.routing = choices.new_full((self._total_blocks * self.block_size, *choices.shape[1:]), -1)
        self.routing.index_copy_(0, slots, choices)

    def copy(self, pairs: Tensor) -> None:
        """Copy whole blocks, all at once: (source, target) of each copy, [copies, 2] int64."""
        tensors = [tensor for layer in self.layers.values() for tensor in layer.values()]
        tensors += [self.routing] if self.routing is not None else []
        source, target = pairs.unbind(1)
        for tensor in tensors:
            blocks = tensor.view(self._total_blocks, -1)
            blocks.index_copy_(0, target, blocks.index_select(0, source))
