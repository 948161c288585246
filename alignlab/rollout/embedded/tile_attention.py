"""Attention of one step on a GPU: the cache is read in place. `PagedBatch`, which gathers, is its slow twin.

Shapes: N tokens of the step, H heads, K kv heads, D size of a query's or key's head, V size of a value's head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.models.paged_flex import flex_paged_attention
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.state_cache import StateBatch, StepStates
from alignlab.rollout.embedded.tile_plan import TileGroup, TileStep


class TileBatch(StateBatch):
    """The tokens of one step and their slots in the cache: the `layout` that layers are given.

    Layers keep keys and values, latents, or entries of sequences; a layer that keeps other entries of tokens needs
    `PagedBatch.update`.
    """

    keeps_latents = True

    def __init__(self, cache: PagedCache, step: TileStep, states: StepStates | None = None) -> None:
        super().__init__(states)
        self._cache = cache
        self._step = step

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
        spec = self._cache.specs[layer_idx]
        entries = spec.entries(key[0].transpose(0, 1), None if value is None else value[0].transpose(0, 1))
        assert sliding_window == spec.window, f"layer {layer_idx} has declared a window of {spec.window}"
        stored = self._cache.write(layer_idx, self._step.slots[spec.window], entries)
        keys, values = spec.key_and_value(
            {name: tensor.view(-1, *entries[name].shape[1:]) for name, tensor in stored.items()}
        )
        flat = query[0].transpose(0, 1)
        outputs = [
            _attention(
                flat, group, keys, values, sliding_window, block_size=self._cache.block_size, scaling=scaling,
                softcap=softcap, sinks=sinks,
            )
            for group in (self._step.rows, self._step.chunks) if group is not None
        ]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]


def _attention(
    flat: Tensor, group: TileGroup, key: Tensor, value: Tensor, window: int | None,
    *, block_size: int, scaling: float, softcap: float | None, sinks: Tensor | None,
) -> Tensor:
    """Return the attention of a group's tokens [tokens,H,V], from the step's queries [N,H,D]; rows come first."""
    tiles = group.tiles[window]
    num_tiles, num_queries = tiles.positions.shape
    queries = flat[:num_tiles] if group.padding is None else flat.index_select(0, group.padding)
    output = flex_paged_attention(
        queries.view(num_tiles, num_queries, *flat.shape[1:]).transpose(1, 2), key, value, tiles,
        group.visited[window], block_size=block_size, scaling=scaling, softcap=softcap, sinks=sinks,
    )
    padded = output.transpose(1, 2).flatten(0, 1)
    return padded if group.unpadding is None else padded.index_select(0, group.unpadding)
