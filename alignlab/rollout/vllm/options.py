"""What vLLM is started with, in this process and in a server: the same options under the same names."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from alignlab.config.rollout import VLLMServerSettings, VLLMSettings
from alignlab.errors import ConfigError
from alignlab.models.adapters import has_adapters
from alignlab.models.export import Model
from alignlab.models.merging import wrappers

BACKEND = "alignlab"
"""The name by which vLLM finds our weight transfer."""
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def engine_options(
    settings: VLLMSettings | VLLMServerSettings, *, dtype: torch.dtype, context_tokens: int, on_cpu: bool, sparse: bool
) -> dict[str, Any]:
    """Options of vLLM's engine, beside the model and what a weight update needs."""
    options: dict[str, Any] = {
        "dtype": _DTYPES[dtype],
        "max_model_len": context_tokens,
        "max_num_seqs": settings.max_running,
        "max_num_batched_tokens": max(settings.prefill_tokens, context_tokens),
        "gpu_memory_utilization": settings.memory_frac,
        "enforce_eager": on_cpu if settings.eager is None else settings.eager,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "alignlab.rollout.vllm.worker.Inspection",
        "disable_log_stats": True,
        "seed": 0,
    }
    if on_cpu:
        # A chunk that does not end a prompt rewinds its request's random numbers, which a CPU generator cannot.
        options["enable_chunked_prefill"] = False
    elif sparse:
        options["enable_return_routed_experts"] = True
    if settings.block_size is not None:
        options["block_size"] = settings.block_size
    if settings.cache_gib is not None:
        options["kv_cache_memory_bytes"] = int(settings.cache_gib * 2**30)
    return options


def travels_alone(settings: VLLMSettings | VLLMServerSettings, model: Model, *, on_cpu: bool) -> bool:
    """Whether the adapter is sent alone: as the settings say; by default to a GPU, for on a CPU vLLM takes twice as
    long to generate with one, and where vLLM can apply the adapter."""
    if settings.sync != "auto":
        return settings.sync == "adapter"
    return has_adapters(model) and not on_cpu and why_not_alone(model) is None


def merged_options() -> dict[str, Any]:
    """What vLLM needs to have all its weights replaced."""
    return {"weight_transfer_config": {"backend": BACKEND}}


def adapter_options(rank: int, *, num_versions: int) -> dict[str, Any]:
    """What vLLM needs to be given adapters of a rank, `num_versions` of which are in use at one time."""
    room = next(room for room in _RANKS if room >= rank)
    return {"enable_lora": True, "max_lora_rank": room, "max_loras": num_versions, "max_cpu_loras": num_versions + 1}


def check_adapter(model: Model) -> int:
    """The rank of an adapter that is to travel alone.

    Raises:
        ConfigError: the policy has none, or one that vLLM cannot apply.
    """
    if not isinstance(model, PeftModel) or not has_adapters(model):
        raise ConfigError("rollout.sync is adapter, and the policy has none; use merged, or give model.lora")
    reason = why_not_alone(model)
    if reason is not None:
        raise ConfigError(f"rollout.sync is adapter, and the adapter {reason}; use rollout.sync: merged")
    config: Any = model.peft_config[model.active_adapter]
    return int(config.r)


def why_not_alone(model: Model) -> str | None:
    """Why vLLM could not apply the policy's adapter by itself; None where it can."""
    assert isinstance(model, PeftModel)
    config: Any = model.peft_config[model.active_adapter]
    if config.r > _RANKS[-1] or config.rank_pattern:
        return f"has rank {config.r} (rank_pattern {config.rank_pattern}), and must have one of at most {_RANKS[-1]}"
    layers: dict[str, Any] = dict(wrappers(model))
    for name, layer in layers.items():
        plain = isinstance(layer, LoraLinear) and isinstance(layer.get_base_layer(), nn.Linear)
        if not plain or layer.lora_variant or any(layer.lora_bias.values()):
            return f"is more than plain LoRA on linear layers, in {name}"
    return None
