"""The kinds of caches by what they approximate, each with the batch that reads it: the one table of them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from alignlab.config.kv_cache import MmapCache
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.kv_approximation.evicted_tokens import EvictedTokens
from alignlab.models.kv_approximation.eviction import WindowedTokens
from alignlab.models.kv_approximation.groups import GroupedRounding
from alignlab.models.kv_approximation.low_rank import LowRank
from alignlab.models.kv_approximation.protocol import KVApproximation
from alignlab.models.kv_approximation.rounding import Rounding
from alignlab.models.kv_approximation.sparse_rows import SparseRows
from alignlab.rollout.embedded.evicting_cache import EvictingBatch, EvictingCache
from alignlab.rollout.embedded.grouped_cache import GroupedBatch, GroupedCache
from alignlab.rollout.embedded.low_rank_cache import LowRankBatch, LowRankCache
from alignlab.rollout.embedded.mapped_cache import MappedBatch, MappedCache
from alignlab.rollout.embedded.paged_attention import PagedBatch
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.rounded_cache import RoundedBatch, RoundedCache
from alignlab.rollout.embedded.sparse_cache import SparseBatch, SparseCache
from alignlab.rollout.embedded.state_cache import StepStates
from alignlab.rollout.embedded.step_plan import StepTensors

_CACHES: dict[type, type[PagedCache]] = {
    Rounding: RoundedCache, GroupedRounding: GroupedCache, EvictedTokens: EvictingCache, SparseRows: SparseCache,
    LowRank: LowRankCache,
    WindowedTokens: PagedCache, type(None): PagedCache,  # exact: the tokens of a window, or all
}  # fmt: skip
"""The cache in memory of each approximation."""
_BATCHES: dict[type[PagedCache], type[PagedBatch]] = {
    PagedCache: PagedBatch, RoundedCache: RoundedBatch, EvictingCache: EvictingBatch, SparseCache: SparseBatch,
    MappedCache: MappedBatch,
}  # fmt: skip
"""What reads a cache, where it needs nothing beside the blocks of a step."""


def make_cache(
    specs: Mapping[int, LayerCacheSpec], block_size: int, approximation: KVApproximation | None,
    *, records_routing: bool, mapped: MmapCache | None = None, dtype: torch.dtype = torch.float32,
) -> PagedCache:
    """Return the cache that keeps what an approximation leaves; None leaves all.

    Args:
        specs, block_size, approximation, records_routing: as of `PagedCache`.
        mapped: a file for an exact cache; None for one in memory.
        dtype: of the model.
    """
    if mapped is not None:
        assert approximation is None, "what lies in a file is exact"
        return MappedCache(specs, block_size, mapped, dtype, records_routing=records_routing)
    cache = _CACHES[type(approximation)]
    return cache(specs, block_size, approximation, records_routing=records_routing)


def make_batch(cache: PagedCache, step: StepTensors, states: StepStates | None) -> PagedBatch:
    """Return the tokens of a step over a cache, which gathers what they read."""
    if isinstance(cache, GroupedCache):
        assert step.group_ends is not None, "the step was planned for groups"
        return GroupedBatch(cache, step.slots, step.groups, step.group_ends, states)
    if isinstance(cache, LowRankCache):
        return LowRankBatch(cache, step.slots, step.groups, step.positions, states)
    return _BATCHES[type(cache)](cache, step.slots, step.groups, states)
