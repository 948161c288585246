"""Memory that a rollout engine will take on a device, predicted from shapes; the device need not be there."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn

from alignlab.config.kv_cache import MmapCache
from alignlab.config.rollout import (
    EngineSettings,
    RolloutSettings,
    VLLMServerSettings,
    approximate_cache,
    cache_group,
    step_tokens,
)
from alignlab.models.cache_spec import cache_specs
from alignlab.models.decoder import causal_lm
from alignlab.models.exact_weights import model_dtype
from alignlab.models.kv_approximation.choice import approximation_of
from alignlab.models.merging import wrappers
from alignlab.rollout.embedded.block_manager import block_size_for
from alignlab.rollout.embedded.block_pools import pool_blocks
from alignlab.rollout.embedded.native.coverage import packed_bytes, why_not_native, why_not_rounded
from alignlab.rollout.embedded.paged_cache import block_bytes
from alignlab.rollout.embedded.rounding import make_rounding
from alignlab.rollout.embedded.state_slots import slots_needed

_COPIES_FRAC = 0.1
"""Of a GPU's memory: what merged copies may take by default. A small model is bound by the number of kernels in a step,
of which an adapter adds many; a large one by memory."""
_STAYING_FRAC = 1 / 16
"""Of a GPU's memory: what the cache of the embedded engine may take while the policy learns."""
_UNSEEN_GPU_BYTES = 80 * 2**30
"""Memory of a GPU that is predicted for and is not here."""
_PLANNED: ContextVar[torch.device | None] = ContextVar("planned", default=None)
_PLANNED_RANKS: ContextVar[int] = ContextVar("planned_ranks", default=1)


@contextmanager
def predicted_for(device_type: str | None, num_ranks: int = 1) -> Iterator[None]:
    """Predict memory for a kind of device, and for a number of ranks, within the context.

    Args:
        device_type: "cpu" or "cuda"; None for the device that is used.
        num_ranks: that share out what the config's strategy shares out.
    """
    token = _PLANNED.set(None if device_type is None else torch.device(device_type))
    token_of_ranks = _PLANNED_RANKS.set(num_ranks)
    try:
        yield
    finally:
        _PLANNED.reset(token)
        _PLANNED_RANKS.reset(token_of_ranks)


def planned_device(device: torch.device) -> torch.device:
    """Return the device that memory is predicted for: that of `predicted_for`, or else the one that is used."""
    return _PLANNED.get() or device


def engine_device(model: nn.Module) -> torch.device:
    """Return the device of a model's engine; of a model without weights, the one that its training would have."""
    device: torch.device = causal_lm(model).device
    if device.type != "meta":
        return device
    return planned_device(torch.device("cuda" if torch.cuda.is_available() else "cpu"))


def planned_ranks() -> int:
    """Return the number of ranks that memory is predicted for; 1 outside `predicted_for`."""
    return _PLANNED_RANKS.get()


def engine_bytes(
    model: nn.Module, settings: EngineSettings, device: torch.device, *, num_sequences: int, num_tokens: int
) -> int:
    """Return the bytes of an engine's copies of weights and of its cache, beside the policy's own weights.

    Args:
        device: of the engine.
        num_sequences: sampled at one time.
        num_tokens: of a prompt and its completion, at most.
    """
    if isinstance(settings, VLLMServerSettings):
        return 0
    if not isinstance(settings, RolloutSettings):
        return _vllm_bytes(model, [num_tokens] * num_sequences)
    block_size = block_size_for(settings.block_size, device, group=cache_group(settings))
    cache = _cache_bytes(model, settings, device, block_size, num_sequences=num_sequences, num_tokens=num_tokens)
    return cache + _copied_bytes(model, settings, device, block_size)


def _vllm_bytes(model: nn.Module, lengths: Sequence[int]) -> int:
    """Return the bytes of vLLM's copy of all weights and of its cache, for sequences of these lengths, tokens."""
    lm = causal_lm(model)
    dtype, specs = model_dtype(lm), cache_specs(model).values()
    num_weights = sum(parameter.numel() for parameter in lm.parameters())
    num_entries = sum(lengths) * sum(spec.token_numel for spec in specs)
    states = sum(spec.sequence_bytes(dtype) for spec in specs)
    return dtype.itemsize * (num_entries + num_weights) + len(lengths) * states


def _cache_bytes(
    model: nn.Module, settings: RolloutSettings, device: torch.device, block_size: int,
    *, num_sequences: int, num_tokens: int,
) -> int:
    """Return the bytes of the embedded engine's cache, its slots of states, and what it swaps into the same memory.

    Args:
        device, num_sequences, num_tokens: as of `engine_bytes`.
        block_size: tokens in a block.
    """
    dtype, specs = model_dtype(causal_lm(model)), cache_specs(model).values()
    approximate = approximate_cache(settings)
    approximation = None if approximate is None else approximation_of(approximate)
    num_running = min(num_sequences, settings.max_running)
    limit = sys.maxsize if settings.cache_tokens is None else -(-settings.cache_tokens // block_size)
    wanted = held = 0
    for spec in specs:
        for window, num_bytes in block_bytes(spec, dtype, block_size, approximation).items():
            blocks = pool_blocks([num_tokens] * num_running, window, step_tokens(settings), block_size)
            wanted, held = wanted + num_bytes * blocks, held + num_bytes * min(blocks, limit)
    slot_bytes = sum(spec.sequence_bytes(dtype) for spec in specs)
    swapped = 0
    if settings.preemption == "swap" and held < wanted and device.type == "cpu":  # a GPU's cache is not the host's
        swapped = min(int(settings.swap_gib * 2**30), wanted + num_running * slot_bytes)
    if isinstance(settings.kv_cache, MmapCache):  # the rest lies on a disk
        held = min(held, int(settings.kv_cache.resident_gib * 2**30))
    return held + swapped + slot_bytes * slots_needed(num_running, num_running)


def _copied_bytes(model: nn.Module, settings: RolloutSettings, device: torch.device, block_size: int) -> int:
    """Return the bytes of the embedded engine's copies of weights: packed, rounded, or with adapters merged in."""
    merges = merges_adapters(model, settings.merge_lora, device)
    rounding = make_rounding(model, settings, device)
    is_native = why_not_native(model, settings, device, block_size=block_size, merges=merges) is None
    if is_native and (rounding is None or why_not_rounded(causal_lm(model), rounding) is None):
        return packed_bytes(model, rounding)
    return (0 if rounding is None else rounding.total_bytes) + (_merged_bytes(model) if merges else 0)


def merges_adapters(model: nn.Module, merge: bool | None, device: torch.device) -> bool:
    """Return whether the embedded engine makes merged copies of adapted layers.

    Args:
        merge: `rollout.merge_lora`.
        device: of the engine.
    """
    if merge is not None or device.type != "cuda":
        return merge is not False
    is_here = torch.cuda.is_available() or _PLANNED.get() is None
    total = torch.cuda.get_device_properties(device).total_memory if is_here else _UNSEEN_GPU_BYTES
    return _merged_bytes(model) <= _COPIES_FRAC * total


def cache_may_stay(num_bytes: int, device: torch.device) -> bool:
    """Return whether a cache of the embedded engine may stay on its device while the policy learns."""
    if device.type != "cuda":
        return False
    return num_bytes <= _STAYING_FRAC * torch.cuda.get_device_properties(device).total_memory


def _merged_bytes(model: nn.Module) -> int:
    """Return the bytes of the layers of which an engine makes copies with the adapter merged in."""
    adapted: list[nn.Module] = [layer.get_base_layer() for layer in set(wrappers(model).values())]  # type: ignore[operator]
    return sum(weight.numel() * weight.element_size() for layer in adapted for weight in layer.parameters())
