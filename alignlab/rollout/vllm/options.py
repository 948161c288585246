"""The options that vLLM is started with, in this process and on a server alike."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from transformers import PreTrainedModel

from alignlab.config.rollout import VLLMServerSettings, VLLMSettings, max_staleness
from alignlab.errors import ConfigError
from alignlab.models.adapters import has_adapters
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm
from alignlab.models.exact_weights import model_dtype
from alignlab.models.hub.export import Model
from alignlab.models.merging import wrappers
from alignlab.models.recurrent.layer import RecurrentLayer
from alignlab.models.routers.uses import check_vllm
from alignlab.models.served_attention import FAMILY_KINDS, check_served, check_served_on_cpu
from alignlab.rollout.vllm.installation import check_returns_experts
from alignlab.rollout.vllm.protocol import TRANSFER_BACKEND

MEMORY_FRAC = 0.9
"""Fraction of a device's memory for a server that has the device for itself."""
_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM takes for max_lora_rank
_FP8_CAPABILITY = (8, 9)
VLLM_QUANTIZATIONS = {
    "fp8": "fp8_per_tensor", "fp8_per_channel": "fp8_per_channel", "fp8_per_block": "fp8_per_block",
    "int8": "int8_per_channel_weight_only",
}  # fmt: skip
"""vLLM's names of what it rounds as it loads, and loads anew, weights: its layerwise reload rounds each layer again.
Its other methods read rounded checkpoints, which an update does not bring."""
_CPU_CACHES = ("fp8", "fp8_e5m2")
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def engine_options(
    settings: VLLMSettings | VLLMServerSettings, model: Model, *, adapter_rank: int, on_cpu: bool
) -> dict[str, Any]:
    """Return the options of vLLM's engine, beside the path of its model.

    Args:
        adapter_rank: of adapters that are synced alone; 0 if all weights are synced.
        on_cpu: vLLM runs on a CPU.

    Raises:
        ConfigError: neither the settings nor the model limit the context, the model cannot be spread or quantized as
            the settings ask, or vLLM's model runner does not return experts.
    """
    lm = causal_lm(model)
    check_model(lm, settings, on_cpu=on_cpu)
    check_vllm(lm)
    check_quantization(settings)
    check_served_cache(settings)
    context_tokens = context_limit(lm, settings)
    options: dict[str, Any] = {
        "dtype": _DTYPES[model_dtype(lm)],
        "max_model_len": context_tokens,
        "max_num_seqs": settings.max_running,
        "max_num_batched_tokens": max(settings.prefill_tokens, context_tokens),
        "gpu_memory_utilization": settings.memory_frac or MEMORY_FRAC,
        "enforce_eager": on_cpu if settings.eager is None else settings.eager,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": "alignlab.rollout.vllm.inside.worker.WorkerExtension",
        "disable_log_stats": True,
        "seed": 0,
    }
    if on_cpu:
        # A chunk that does not end a prompt rewinds its request's random numbers, which a CPU generator cannot.
        options["enable_chunked_prefill"] = False
        # States of a prefix are found again by chunks alone.
        options["enable_prefix_caching"] = not any(isinstance(module, RecurrentLayer) for module in lm.modules())
    elif getattr(lm.config, "sparse_layers", ()):
        check_returns_experts()
        options["enable_return_routed_experts"] = True
    if settings.tensor_parallel > 1:
        options |= {"tensor_parallel_size": settings.tensor_parallel, "distributed_executor_backend": "mp"}
    return options | _given_options(settings) | _sync_options(adapter_rank, num_adapters=max_staleness(settings) + 1)


def _given_options(settings: VLLMSettings | VLLMServerSettings) -> dict[str, Any]:
    """Return the options that a user gives; vLLM's own defaults stand for the others."""
    given = {
        "quantization": None if settings.quantization is None else VLLM_QUANTIZATIONS[settings.quantization],
        "kv_cache_dtype": settings.kv_cache, "block_size": settings.block_size,
        "kv_cache_memory_bytes": None if settings.cache_gib is None else int(settings.cache_gib * 2**30),
    }
    return {name: value for name, value in given.items() if value is not None}


def check_model(
    lm: PreTrainedModel, settings: VLLMSettings | VLLMServerSettings, *, on_cpu: bool = False
) -> None:
    """Raise unless vLLM can compute a model's attention, and spread and quantize it as the settings ask.

    Args:
        on_cpu: vLLM is known to run on a CPU.

    Raises:
        ConfigError: vLLM does not know a kind of the model's attention, `tensor_parallel` does not divide the attention
            heads, a model in float32 is to be quantized, or experts of a model without any.
    """
    if isinstance(lm.config, PolicyConfig):
        check_served(lm.config)
        if on_cpu:
            check_served_on_cpu(lm.config, model_dtype(lm))
    heads, size = getattr(lm.config.get_text_config(), "num_attention_heads", None), settings.tensor_parallel
    if heads is not None and heads % size:
        divisors = [n for n in range(1, heads + 1) if heads % n == 0]
        raise ConfigError(
            f"rollout.tensor_parallel is {size}, and must divide the model's {heads} attention heads; use one of "
            f"{', '.join(map(str, divisors))}"
        )
    if settings.quantization is not None and model_dtype(lm) == torch.float32:
        raise ConfigError(
            f"rollout.quantization is {settings.quantization}, and must be null for a model in float32, which vLLM "
            "does not quantize; use model.dtype: bfloat16, or remove it"
        )
    if settings.quantization == "int8" and not getattr(lm.config, "sparse_layers", ()):
        raise ConfigError(
            "rollout.quantization is int8, for which vLLM rounds experts alone, and the model has none; use fp8, or "
            "rollout.engine: embedded, which rounds linear layers"
        )


def check_quantization(settings: VLLMSettings | VLLMServerSettings) -> None:
    """Raise unless vLLM can quantize weights as the settings ask on this machine's device.

    Raises:
        ConfigError: with the device that cannot.
    """
    if settings.quantization is None:
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            f"rollout.quantization is {settings.quantization}, and must be null on a CPU, where vLLM has no products "
            "of weights that it rounds; remove it, or use rollout.engine: embedded with quantization: int8"
        )
    capability = torch.cuda.get_device_capability()
    if settings.quantization != "int8" and capability < _FP8_CAPABILITY:
        raise ConfigError(
            f"rollout.quantization is {settings.quantization}, and must be null on a GPU of compute capability "
            f"{'.'.join(map(str, capability))}, which has no fp8 (8.9 and over have it); remove it"
        )


def check_served_cache(settings: VLLMSettings | VLLMServerSettings) -> None:
    """Raise unless vLLM can have the cache that the settings name on this machine's device.

    Raises:
        ConfigError: the cache is one that vLLM takes on a CPU, and then computes wrong numbers with.
    """
    if settings.kv_cache is None or settings.kv_cache in _CPU_CACHES or torch.cuda.is_available():
        return
    raise ConfigError(
        f"rollout.kv_cache is {settings.kv_cache}, and must be {' or '.join(_CPU_CACHES)} on a CPU: vLLM's attention "
        "there reads the codes of other caches as numbers, and says nothing; use fp8, or rollout.engine: embedded with "
        "kv_cache: {type: int8}"
    )


def require_gpus(num_needed: int, num_visible: int) -> None:
    """Raise if a vLLM is to be spread over more GPUs than there are.

    Raises:
        ConfigError: with both numbers.
    """
    if num_needed > num_visible:
        raise ConfigError(
            f"rollout.tensor_parallel is {num_needed}, and this process sees {num_visible} GPUs; use {num_visible} or "
            "less, or name more in CUDA_VISIBLE_DEVICES"
        )


def context_limit(lm: PreTrainedModel, settings: VLLMSettings | VLLMServerSettings) -> int:
    """Return the limit of prompt and completion together, tokens.

    Raises:
        ConfigError: neither the settings nor the model's config have one.
    """
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    limits = [limit for limit in (positions, settings.context_tokens) if limit is not None]
    if not limits:
        raise ConfigError(
            f"rollout.context_tokens is null, and must be given: the config of {type(lm).__name__} names no limit of "
            "its own; use the longest prompt and completion together"
        )
    return min(limits)


def sync_adapter_only(settings: VLLMSettings | VLLMServerSettings, model: Model, *, on_cpu: bool) -> bool:
    """Return True if updates send the adapter alone, as `rollout.sync` says.

    `auto` sends it alone to a GPU, if vLLM can apply it; on a CPU, vLLM generates half as fast with an adapter.
    """
    if settings.sync != "auto":
        return settings.sync == "adapter"
    if isinstance(settings, VLLMServerSettings) and settings.transfer == "broadcast":
        return False
    return not on_cpu and settings.tensor_parallel == 1 and can_sync_adapter_only(model)


def can_sync_adapter_only(model: Model) -> bool:
    """Return True if the policy has an adapter that vLLM can apply."""
    return has_adapters(model) and _obstacle(model) is None


def checked_adapter_rank(model: Model) -> int:
    """Return the rank of an adapter that is to be synced alone.

    Raises:
        ConfigError: the policy has no adapter, or one that vLLM cannot apply.
    """
    if not isinstance(model, PeftModel) or not has_adapters(model):
        raise ConfigError("rollout.sync is adapter, and the policy has none; use merged, or give model.lora")
    obstacle = _obstacle(model)
    if obstacle is not None:
        raise ConfigError(f"rollout.sync is adapter, and the adapter {obstacle}; use rollout.sync: merged")
    config: Any = model.peft_config[model.active_adapter]
    return int(config.r)


def _sync_options(adapter_rank: int, *, num_adapters: int) -> dict[str, Any]:
    if adapter_rank == 0:
        return {"weight_transfer_config": {"backend": TRANSFER_BACKEND}}
    max_rank = next(rank for rank in _MAX_RANKS if rank >= adapter_rank)
    # One more in the host's memory: the next adapter is loaded before the oldest goes.
    return {
        "enable_lora": True, "max_lora_rank": max_rank, "max_loras": num_adapters, "max_cpu_loras": num_adapters + 1,
    }  # fmt: skip


def _obstacle(model: Model) -> str | None:
    """Return why vLLM cannot apply the policy's adapter by itself; None if it can."""
    assert isinstance(model, PeftModel)
    config: Any = model.peft_config[model.active_adapter]
    if config.r > _MAX_RANKS[-1] or config.rank_pattern:
        return (
            f"has rank {config.r} (rank_pattern {config.rank_pattern}), and must have one of at most {_MAX_RANKS[-1]}"
        )
    if set(getattr(causal_lm(model).config, "layer_types", None) or ()).intersection(FAMILY_KINDS):
        return "is of a model with latent attention or recurrent layers, whose products vLLM keeps merged with others"
    name = next((name for name, layer in wrappers(model).items() if not _is_plain_lora(layer)), None)
    return None if name is None else f"is more than plain LoRA on linear layers, in {name}"


def _is_plain_lora(layer: Any) -> bool:
    is_linear = isinstance(layer, LoraLinear) and isinstance(layer.get_base_layer(), nn.Linear)
    return is_linear and not layer.lora_variant and not any(layer.lora_bias.values())
