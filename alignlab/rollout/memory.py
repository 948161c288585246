"""Memory that a rollout engine will take on the trainer's device, predicted from shapes."""

from __future__ import annotations

import torch
from torch import nn

from alignlab.config.rollout import EngineSettings, RolloutSettings, VLLMServerSettings
from alignlab.models.cache_spec import cache_specs
from alignlab.models.decoder import causal_lm
from alignlab.models.exact_weights import model_dtype
from alignlab.models.merging import wrappers

_COPIES_FRAC = 0.1
"""Of a GPU's memory: what merged copies may take by default. A small model is bound by the number of kernels in a step,
of which an adapter adds many; a large one by memory."""


def engine_bytes(
    model: nn.Module, settings: EngineSettings, device: torch.device, *, num_sequences: int, num_tokens: int
) -> int:
    """Return the bytes of an engine's copies of weights and of its cache, beside the policy's own weights.

    Args:
        device: of the engine.
        num_sequences: sampled at one time.
        num_tokens: of a prompt and its completion, at most.
    """
    lm = causal_lm(model)
    if isinstance(settings, VLLMServerSettings):
        return 0
    cache = num_sequences * num_tokens * model_dtype(lm).itemsize * sum(
        spec.token_numel for spec in cache_specs(model).values()
    )  # fmt: skip
    if not isinstance(settings, RolloutSettings):  # vLLM holds a copy of all weights
        return cache + sum(parameter.numel() for parameter in lm.parameters()) * model_dtype(lm).itemsize
    return cache + (_merged_bytes(model) if merges_adapters(model, settings.merge_lora, device) else 0)


def merges_adapters(model: nn.Module, merge: bool | None, device: torch.device) -> bool:
    """Return whether the embedded engine makes merged copies of adapted layers.

    Args:
        merge: `rollout.merge_lora`.
        device: of the engine.
    """
    if merge is not None or device.type != "cuda":
        return merge is not False
    return _merged_bytes(model) <= _COPIES_FRAC * torch.cuda.get_device_properties(device).total_memory


def _merged_bytes(model: nn.Module) -> int:
    """Return the bytes of the layers of which an engine makes copies with the adapter merged in."""
    adapted: list[nn.Module] = [layer.get_base_layer() for layer in set(wrappers(model).values())]  # type: ignore[operator]
    return sum(weight.numel() * weight.element_size() for layer in adapted for weight in layer.parameters())
