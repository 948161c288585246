"""Memory that a rollout engine will take on the trainer's device, predicted from shapes."""

from __future__ import annotations

from torch import nn

from alignlab.config.rollout import EngineSettings, RolloutSettings, VLLMServerSettings
from alignlab.models.cache_spec import cache_specs
from alignlab.models.decoder import causal_lm
from alignlab.models.merging import wrappers


def engine_bytes(model: nn.Module, settings: EngineSettings, *, num_sequences: int, num_tokens: int) -> int:
    """Return the bytes of an engine's copies of weights and of its cache, beside the policy's own weights.

    Args:
        num_sequences: sampled at one time.
        num_tokens: of a prompt and its completion, at most.
    """
    lm = causal_lm(model)
    if isinstance(settings, VLLMServerSettings):
        return 0
    cache = num_sequences * num_tokens * lm.dtype.itemsize * sum(
        spec.token_numel for spec in cache_specs(model).values()
    )  # fmt: skip
    if not isinstance(settings, RolloutSettings):  # vLLM holds a copy of all weights
        return cache + sum(parameter.numel() for parameter in lm.parameters()) * lm.dtype.itemsize
    return cache + (_merged_bytes(model) if settings.merge_lora else 0)


def _merged_bytes(model: nn.Module) -> int:
    """Return the bytes of the layers of which an engine makes copies with the adapter merged in."""
    adapted: list[nn.Module] = [layer.get_base_layer() for layer in set(wrappers(model).values())]  # type: ignore[operator]
    return sum(weight.numel() * weight.element_size() for layer in adapted for weight in layer.parameters())
