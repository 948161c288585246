"""The approximation that settings name, and the models that can have it."""

from __future__ import annotations

from torch import nn

from alignlab.config.kv_cache import (
    ApproximateCache,
    EvictCache,
    Int4Cache,
    ThresholdCache,
    TopKCache,
    WindowCache,
)
from alignlab.config.rollout import EngineSettings, approximate_cache
from alignlab.errors import ConfigError
from alignlab.models.cache_spec import cache_specs
from alignlab.models.kv_approximation.evicted_tokens import EvictedTokens
from alignlab.models.kv_approximation.eviction import WindowedTokens
from alignlab.models.kv_approximation.groups import GroupedRounding
from alignlab.models.kv_approximation.protocol import KVApproximation
from alignlab.models.kv_approximation.rounding import Rounding
from alignlab.models.kv_approximation.sparse_rows import SparseRows
from alignlab.models.sink_window import KeptTokens, SinkWindow


def approximation_of(cache: ApproximateCache) -> KVApproximation:
    """Return the approximation that the settings of a cache name."""
    if isinstance(cache, Int4Cache):
        return GroupedRounding(cache.group, cache.recent)
    if isinstance(cache, WindowCache):
        return WindowedTokens(SinkWindow(cache.tokens, cache.sinks))
    if isinstance(cache, EvictCache):
        kept = KeptTokens(cache.heavy, cache.recent, cache.sinks, cache.interval, cache.observed)
        return EvictedTokens(kept, cache.accumulate)
    if isinstance(cache, TopKCache):
        return SparseRows(cache.recent, count=cache.tokens)
    if isinstance(cache, ThresholdCache):
        return SparseRows(cache.recent, part=cache.part, mass=cache.mass)
    return Rounding(cache.type)


def replayed_approximation(settings: EngineSettings) -> KVApproximation | None:
    """Return the approximation of the engine's cache that the trainer replays; None if it computes exactly."""
    cache = approximate_cache(settings)
    return None if cache is None or not cache.replay else approximation_of(cache)


def check_cache(model: nn.Module, settings: EngineSettings) -> None:
    """Raise if the layers of a model cannot have the cache that the settings name.

    Raises:
        ConfigError: a layer keeps latents, no layer keeps keys and values, or 4-bit codes cannot be paired.
    """
    cache = approximate_cache(settings)
    if cache is None:
        return
    specs = {layer_idx: spec for layer_idx, spec in cache_specs(model).items() if spec.per_token}
    latent = [layer_idx for layer_idx, spec in specs.items() if spec.value_columns is not None]
    fix = "use rollout.kv_cache: {type: exact}"
    if latent:
        raise ConfigError(
            f"rollout.kv_cache is {cache.type}, and layer {latent[0]} keeps a latent, where keys and values are "
            f"approximated; {fix}"
        )
    if not specs:
        raise ConfigError(
            f"rollout.kv_cache is {cache.type}, and the model keeps no keys and values, only states of sequences; {fix}"
        )
    sizes = {size for spec in specs.values() for _, size in spec.per_token.values()}
    odd = sorted(size for size in sizes if size % 2)
    if isinstance(cache, Int4Cache) and odd:
        raise ConfigError(
            f"rollout.kv_cache is int4, which keeps two numbers in a byte, and heads have {odd[0]} numbers, an odd "
            "count; use rollout.kv_cache: {type: int8}"
        )
