"""Models and settings that the native step covers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignlab.config.kv_cache import MmapCache
from alignlab.config.rollout import RolloutSettings, approximate_cache
from alignlab.models.attention import Attention, SlidingAttention
from alignlab.models.attention_kinds import ATTENTION_KINDS
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm
from alignlab.models.exact_weights import dtype_of, model_dtype
from alignlab.models.merging import wrappers
from alignlab.models.moe import Experts
from alignlab.models.routers.topk import TopKRouter
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.native.processor import INTEGER_PRODUCTS, NEEDED, missing_flags, processor_flags
from alignlab.rollout.embedded.native.packing import ACTIVATIONS, SCORINGS
from alignlab.rollout.embedded.rounding import Rounding, weights_of

_KINDS = (Attention, SlidingAttention)
_NORMS = ("rmsnorm", "zero_centered_rmsnorm")
_REVIEWED = """
vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim
hidden_act max_position_embeddings initializer_range rms_norm_eps use_cache pad_token_id bos_token_id
eos_token_id tie_word_embeddings rope_parameters attention_bias attention_out_bias attention_dropout mlp_bias
use_qk_norm qk_norm_scope query_pre_attn_scalar norm_type norm_position parallel_attn residual_dropout mlp_gated
fused_projections embedding_multiplier rope_local_base_freq num_mtp_layers mtp_mlp_layer_type mtp_loss_coef
mtp_detach layer_types sliding_window no_rope_layers attention_sinks q_lora_rank kv_lora_rank qk_nope_head_dim
qk_rope_head_dim v_head_dim rope_interleave num_attention_experts attention_router_aux_loss_coef
linear_num_key_heads linear_num_value_heads linear_key_head_dim linear_value_head_dim linear_conv_kernel_dim
latent_norm_eps attn_logit_softcapping final_logit_softcapping mlp_layer_types num_experts num_experts_per_tok
moe_intermediate_size n_shared_experts shared_expert_intermediate_size shared_expert_gate router_type
scoring_func topk_method n_group topk_group capacity_factor capacity_priority norm_topk_prob
routed_scaling_factor router_aux_loss_coef router_z_loss_coef router_seq_aux_loss_coef
router_device_aux_loss_coef router_comm_aux_loss_coef router_importance_loss_coef router_load_loss_coef
router_reinforce_coef router_sinkhorn_rounds router_bias_update_rate router_bias router_in_fp32 hub_config
"""
"""Fields of a config that the kernels compute, that do not change a step, or that are asked for below. A model that has
any other is not covered, so that a new field is never left out in silence."""


def why_not_native(
    model: nn.Module, settings: RolloutSettings, device: torch.device, *, block_size: int, merges: bool
) -> str | None:
    """Return why the native step cannot take the place of the Python one; None if it can, once it is compiled.

    Args:
        model: the policy.
        device: of the engine.
        block_size: tokens in a block of the cache.
        merges: adapters, if there are any, are merged into copies.
    """
    lm = causal_lm(model)
    if settings.native == "off":
        return "rollout.native is off"
    if device.type != "cpu":
        return f"the engine runs on {device.type}"
    if not isinstance(lm, PolicyForCausalLM):
        return f"{type(lm).__name__} is not one of our own models"
    dtype = model_dtype(lm)
    reason = _why_not_dtype(dtype, settings) or _why_not_cache(settings) or _why_not_weights(model, dtype, merges)
    if reason is None and dtype == torch.bfloat16 and block_size % 2:
        reason = f"blocks of {block_size} tokens are odd"
    return reason or _why_not_config(lm.config, dtype)


def _why_not_dtype(dtype: torch.dtype, settings: RolloutSettings) -> str | None:
    """Return why there are no kernels for weights of a dtype on this processor, or none that would gain anything."""
    if dtype not in NEEDED:
        return f"the weights are {dtype}"
    if dtype == torch.float32 and settings.native != "required":
        return "the weights are float32, whose products torch computes as fast"
    missing = missing_flags(dtype)
    return f"the processor has no {', '.join(missing)}" if missing else None


def _why_not_cache(settings: RolloutSettings) -> str | None:
    """Return why the kernels cannot read the cache that the settings name."""
    cache = approximate_cache(settings)
    if cache is not None:
        return f"the cache approximates keys and values (kv_cache: {cache.type})"
    if isinstance(settings.kv_cache, MmapCache):
        return "the cache lies in a file (kv_cache: mmap), which the kernels would read whole"
    return None


def _why_not_weights(model: nn.Module, dtype: torch.dtype, merges: bool) -> str | None:
    """Return why a policy's weights cannot be packed: adapters stay apart, or not all weights have the dtype."""
    if wrappers(model) and not merges:
        return "the adapter is applied as it is (merge_lora: false)"
    others = sorted({str(dtype_of(weight)) for weight in _weights(causal_lm(model))} - {str(dtype)})
    return f"some weights are {', '.join(others)} beside {dtype}" if others else None


def _why_not_config(config: PolicyConfig, dtype: torch.dtype) -> str | None:
    """Return what of a config the kernels do not compute."""
    kinds = sorted({kind for kind in config.layer_types or () if ATTENTION_KINDS[kind] not in _KINDS})
    problems = {
        f"layers are of kind {', '.join(kinds)}": bool(kinds),
        f"norms are {config.norm_type}": config.norm_type not in _NORMS,
        "attention and feed-forward are parallel": config.parallel_attn,
        "feed-forwards are not gated": not config.mlp_gated,
        f"the activation is {config.hidden_act}": config.hidden_act not in ACTIVATIONS,
        "the model routes attention heads": bool(config.routed_attention),
    }
    if dtype == torch.bfloat16:
        odd = _odd_size(config)
        problems[f"a size of the model, {odd}, is odd"] = odd is not None
    for name in sorted(set(PolicyConfig.__annotations__) - set(_REVIEWED.split())):
        problems[f"the config has {name}"] = getattr(config, name) != getattr(PolicyConfig, name)
    problems["the router is not a plain top-k"] = bool(config.sparse_layers) and not _has_plain_router(config)
    return next((reason for reason, holds in problems.items() if holds), None)


def _odd_size(config: PolicyConfig) -> int | None:
    """Return the first odd size of a model, whose numbers cannot be paired; None if all are even."""
    inner = (config.intermediate_size, config.moe_intermediate_size or 0, config.shared_expert_size)
    return next((size for size in (config.hidden_size, config.head_dim or 0, *inner) if size % 2), None)


def _has_plain_router(config: PolicyConfig) -> bool:
    is_plain = config.router_type == "topk" and config.topk_method == "greedy" and config.capacity_factor is None
    return is_plain and config.scoring_func in SCORINGS


def why_not_rounded(lm: PreTrainedModel, rounding: Rounding) -> str | None:
    """Return why the kernels cannot have weights rounded as they are; None if they can."""
    if INTEGER_PRODUCTS not in processor_flags():
        return f"the processor has no {INTEGER_PRODUCTS}"
    decoder: Any = lm.get_decoder()
    together = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    for module in decoder.modules():
        for names in together:
            layers = [getattr(module, name, None) for name in names]
            if None not in layers and 0 < len(rounding.layers.intersection(layers)) < len(layers):
                return f"of {', '.join(names)}, which it computes together, rollout.quantization.exact has some alone"
    return None


def packed_bytes(model: nn.Module, rounding: Rounding | None = None) -> int:
    """Return the bytes of the packed weights of a model: those of its layers and of the head, adapters merged in."""
    lm = causal_lm(model)
    head: Any = lm.get_output_embeddings()
    rounded = {id(weight) for layer in (rounding.layers if rounding else ()) for weight in weights_of(layer)}
    weights = [*_weights(lm.get_decoder().get_submodule("layers")), head.weight]
    return sum(
        rounding.num_bytes(weight) if rounding and id(weight) in rounded else weight.numel() * dtype_of(weight).itemsize
        for weight in weights
    )


def _weights(module: nn.Module) -> Iterator[Tensor]:
    """Yield the weights that the kernels multiply by, without those of adapters."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear | Experts | TopKRouter) and ".lora_" not in name:
            yield from (weight for weight in layer.parameters(recurse=False) if weight.dim() > 1)
