"""The approximation that settings name, and the models that can have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from alignlab.config.kv_cache import (
    ApproximateCache,
    EvictCache,
    Int4Cache,
    LowRankCache,
    ThresholdCache,
    TopKCache,
    WindowCache,
)
from alignlab.config.rollout import EngineSettings, approximate_cache
from alignlab.errors import ConfigError
from alignlab.models.cache_spec import LayerCacheSpec, cache_specs
from alignlab.models.kv_approximation.evicted_tokens import EvictedTokens
from alignlab.models.kv_approximation.eviction import WindowedTokens
from alignlab.models.kv_approximation.groups import GroupedRounding
from alignlab.models.kv_approximation.low_rank import LowRank
from alignlab.models.kv_approximation.low_rank_bases import LowRankBases, bases_of
from alignlab.models.kv_approximation.protocol import KVApproximation
from alignlab.models.kv_approximation.rounding import Rounding
from alignlab.models.kv_approximation.sparse_rows import SparseRows
from alignlab.models.sink_window import KeptTokens, SinkWindow
from alignlab.types import Prompt


def approximation_of(cache: ApproximateCache, model: nn.Module | None = None) -> KVApproximation:
    """Return the approximation that the settings of a cache name.

    Args:
        model: whose cache it is; None where only its size is asked for.
    """
    if isinstance(cache, LowRankCache):
        return LowRank(bases_of(model, cache))
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


def replayed_approximation(settings: EngineSettings, model: nn.Module | None = None) -> KVApproximation | None:
    """Return the approximation of the engine's cache that the trainer replays; None if it computes exactly."""
    cache = approximate_cache(settings)
    return None if cache is None or not cache.replay else approximation_of(cache, model)


def measure_cache(model: nn.Module, settings: EngineSettings, prompts: Sequence[Prompt]) -> None:
    """Measure what the cache's approximation needs to know of a model, on prompts, if any, unless it is known.

    Raises:
        ConfigError: see `LowRankBases.measure`.
    """
    bases = shared_bases(model, settings)
    if bases is not None and prompts:
        bases.measure(model, [prompt.token_ids for prompt in prompts])


def shared_bases(model: nn.Module, settings: EngineSettings) -> LowRankBases | None:
    """Return the bases of a model's cache in few dimensions, which its trainer and its engine share; None without one.
    """
    cache = approximate_cache(settings)
    return bases_of(model, cache) if isinstance(cache, LowRankCache) else None


def check_cache(model: nn.Module, settings: EngineSettings) -> None:
    """Raise if the layers of a model cannot have the cache that the settings name.

    Raises:
        ConfigError: a layer keeps latents, no layer keeps keys and values, no layer would be approximated, 4-bit codes
            cannot be paired, or a head has fewer dimensions than are to be kept.
    """
    cache = approximate_cache(settings)
    if cache is None:
        return
    specs = {layer_idx: spec for layer_idx, spec in cache_specs(model).items() if spec.per_token}
    obstacle = _obstacle_of_layers(cache, specs)
    if obstacle is not None:
        raise ConfigError(f"rollout.kv_cache is {cache.type}, and {obstacle}; use rollout.kv_cache: {{type: exact}}")
    if isinstance(cache, LowRankCache) and cache.rank is not None:
        _check_rank(cache.rank, specs)
    if isinstance(cache, Int4Cache):
        _check_pairs(specs)


def _obstacle_of_layers(cache: ApproximateCache, specs: Mapping[int, LayerCacheSpec]) -> str | None:
    """Return why no layer can have the cache's approximation; None if some can."""
    latent = [layer_idx for layer_idx, spec in specs.items() if spec.value_columns is not None]
    if latent:
        return f"layer {latent[0]} keeps a latent, where keys and values are approximated"
    if not specs:
        return "the model keeps no keys and values, only states of sequences"
    if isinstance(cache, EvictCache | TopKCache | ThresholdCache) and all(spec.window for spec in specs.values()):
        return "all layers have windows of their own, which they keep: nothing would be approximated"
    return None


def _check_pairs(specs: Mapping[int, LayerCacheSpec]) -> None:
    """Raise a ConfigError if the numbers of a head cannot be paired, as 4-bit codes in a byte are."""
    odd_sizes = {size for spec in specs.values() for _, size in spec.per_token.values() if size % 2}
    if odd_sizes:
        raise ConfigError(
            "rollout.kv_cache is int4, which keeps two numbers in a byte, and heads have "
            f"{min(odd_sizes)} numbers, an odd count; use rollout.kv_cache: {{type: int8}}"
        )


def _check_rank(rank: int, specs: Mapping[int, LayerCacheSpec]) -> None:
    """Raise a ConfigError if a head has fewer dimensions than are to be kept."""
    for layer_idx, spec in specs.items():
        size = min(size for _, size in spec.per_token.values())
        if rank > size:
            raise ConfigError(
                f"rollout.kv_cache.rank is {rank}, and must be at most the size of a head, which is {size} in layer "
                f"{layer_idx}; use {max(1, size // 2)}, or {{type: exact}}"
            )
