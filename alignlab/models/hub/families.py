"""Hub families that a `PolicyConfig` can stand for, and the translation of configs in both directions.

A `PolicyConfig` belongs to a family if writing the family's config and reading that again gives the same shape, so a
field that a family lacks is never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    KimiLinearConfig,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.hub import deepseek_families as deepseek
from alignlab.models.hub import dense_families as dense
from alignlab.models.hub import recurrent_families as recurrent
from alignlab.models.hub.family_fields import (
    Fields,
    balance_coef,
    read_one_window,
    read_windows,
    require_value,
    whole_rotation,
)

_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "attention_dropout",
)
_TOKENS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
_SHAPE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
    "attention_bias", "attention_out_bias", "attention_dropout", "use_qk_norm", "layer_types", "sliding_window",
    "attn_logit_softcapping", "final_logit_softcapping", "mlp_layer_types", "no_rope_layers", "attention_sinks",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope_interleave",
    "norm_type", "norm_position", "parallel_attn", "qk_norm_scope", "query_pre_attn_scalar", "embedding_multiplier",
    "rope_local_base_freq", "latent_norm_eps", "fused_projections", "linear_num_key_heads", "linear_num_value_heads",
    "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim", "num_mtp_layers", "shared_layers",
)
_DENSE_SHAPE = ("intermediate_size", "mlp_bias", "mlp_gated")
_SPARSE_SHAPE = (
    "num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "scoring_func",
    "norm_topk_prob", "routed_scaling_factor", "router_type", "topk_method", "capacity_factor", "router_in_fp32",
    "shared_expert_gate", "shared_expert_size", "expert_bias", "router_linear_bias", "swiglu_limit", "swiglu_alpha",
)
_RECURRENT = ("gated_deltanet", "fused_gated_deltanet", "kimi_delta_attention")
_GROUP_SHAPE = ("n_group", "topk_group")
_UNREAD_WINDOW = 128  # of gpt-oss where no layer has one: `transformers` makes the mask all the same


@dataclass(frozen=True)
class Family:
    """A Hub architecture.

    Attributes:
        config_class: its config in `transformers`.
        to_policy: translates the family's config into fields of `PolicyConfig`, except those that all families share,
            unless they have another name or meaning there.
        to_hub: translates a `PolicyConfig` into fields of the family's config, likewise.
        for_vllm: returns fields that the family's first checkpoints have and vLLM reads, and `transformers` neither
            needs nor writes.
    """

    config_class: type[PreTrainedConfig]
    to_policy: Callable[[Any], Fields]
    to_hub: Callable[[PolicyConfig], Fields]
    for_vllm: Callable[[PolicyConfig], Fields] = lambda config: {}


def _read_llama(hub: Any) -> Fields:
    return {"attention_bias": hub.attention_bias, "mlp_bias": hub.mlp_bias}


def _write_llama(config: PolicyConfig) -> Fields:
    return {"head_dim": config.head_dim, "attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}


def _write_windows(config: PolicyConfig) -> Fields:
    return {
        "layer_types": config.layer_types,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.num_hidden_layers,
    }


def _read_qwen2(hub: Any) -> Fields:
    return {"attention_bias": True, "attention_out_bias": False, **read_windows(hub)}


def _read_qwen3(hub: Any) -> Fields:
    return {"attention_bias": hub.attention_bias, "use_qk_norm": True, **read_windows(hub)}


def _write_qwen3(config: PolicyConfig) -> Fields:
    return {"head_dim": config.head_dim, "attention_bias": config.attention_bias, **_write_windows(config)}


def _read_mixtral(hub: Any) -> Fields:
    if hub.router_jitter_noise:
        raise ConfigError(f"router_jitter_noise is {hub.router_jitter_noise}, and must be 0; routing is replayed")
    return {
        "num_experts": hub.num_local_experts,
        "num_experts_per_tok": hub.num_experts_per_tok,
        "moe_intermediate_size": hub.intermediate_size,
        "router_aux_loss_coef": balance_coef(hub),
        **read_one_window(hub),
    }


def _write_mixtral(config: PolicyConfig) -> Fields:
    return {
        "head_dim": config.head_dim,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "sliding_window": config.sliding_window,
    }


def _read_qwen3_moe(hub: Any) -> Fields:
    sparse = [
        index not in hub.mlp_only_layers and hub.num_experts > 0 and (index + 1) % hub.decoder_sparse_step == 0
        for index in range(hub.num_hidden_layers)
    ]
    return {
        "attention_bias": hub.attention_bias,
        "use_qk_norm": True,
        "mlp_layer_types": ["sparse" if experts else "dense" for experts in sparse],
        "num_experts": hub.num_experts,
        "num_experts_per_tok": hub.num_experts_per_tok,
        "moe_intermediate_size": hub.moe_intermediate_size,
        "norm_topk_prob": hub.norm_topk_prob,
        "router_aux_loss_coef": balance_coef(hub),
        **read_one_window(hub),
    }


def _write_qwen3_moe(config: PolicyConfig) -> Fields:
    dense = [index for index in range(config.num_hidden_layers) if index not in config.sparse_layers]
    return {
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "use_sliding_window": config.sliding_window is not None,
        "sliding_window": config.sliding_window,
        "mlp_only_layers": dense,
        "decoder_sparse_step": 1,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
    }


def _read_gpt_oss(hub: Any) -> Fields:
    require_value(hub, "hidden_act", "silu")
    return {
        "attention_bias": hub.attention_bias,
        "attention_sinks": True,
        "num_experts": hub.num_local_experts,
        "num_experts_per_tok": hub.num_experts_per_tok,
        "moe_intermediate_size": hub.intermediate_size,
        "router_aux_loss_coef": balance_coef(hub),
        "router_linear_bias": True,
        "expert_bias": True,
        "swiglu_limit": hub.swiglu_limit,
        "swiglu_alpha": hub.swiglu_alpha,
        **read_windows(hub),
    }


def _write_gpt_oss(config: PolicyConfig) -> Fields:
    return {
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "num_local_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "intermediate_size": config.moe_intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "swiglu_alpha": config.swiglu_alpha,
        "layer_types": config.layer_types,
        "sliding_window": config.sliding_window or _UNREAD_WINDOW,
    }


FAMILIES = {
    "llama": Family(LlamaConfig, _read_llama, _write_llama),
    "qwen2": Family(Qwen2Config, _read_qwen2, _write_windows),
    "qwen3": Family(Qwen3Config, _read_qwen3, _write_qwen3),
    "mixtral": Family(MixtralConfig, _read_mixtral, _write_mixtral),
    "qwen3_moe": Family(Qwen3MoeConfig, _read_qwen3_moe, _write_qwen3_moe),
    "gemma2": Family(Gemma2Config, dense.read_gemma2, dense.write_gemma2),
    "gemma3_text": Family(Gemma3TextConfig, dense.read_gemma3, dense.write_gemma3),
    "gpt_oss": Family(GptOssConfig, _read_gpt_oss, _write_gpt_oss),
    "olmo2": Family(Olmo2Config, dense.read_olmo2, dense.write_olmo2),
    "phi3": Family(Phi3Config, dense.read_phi3, dense.write_phi3),
    "deepseek_v3": Family(
        DeepseekV3Config, deepseek.read_deepseek_v3, deepseek.write_deepseek_v3, deepseek.v3_for_vllm
    ),
    "deepseek_v2": Family(DeepseekV2Config, deepseek.read_deepseek_v2, deepseek.write_deepseek_v2),
    "qwen3_next": Family(Qwen3NextConfig, recurrent.read_qwen3_next, recurrent.write_qwen3_next),
    "qwen3_5_text": Family(Qwen3_5TextConfig, recurrent.read_qwen3_5, recurrent.write_qwen3_5),
    "kimi_linear": Family(
        KimiLinearConfig, recurrent.read_kimi_linear, recurrent.write_kimi_linear, recurrent.kimi_for_vllm
    ),
}


def read_hub_config(hub: PreTrainedConfig) -> PolicyConfig | None:
    """Return our config of a Hub model; None where its family is unknown.

    Raises:
        ConfigError: the family is known, but this model has a feature that ours lacks.
    """
    family = FAMILIES.get(hub.model_type)
    if family is None:
        return None
    fields = family.to_policy(hub)
    shared = {name: getattr(hub, name) for name in _SHARED if name not in fields}
    if "rope_parameters" not in fields:
        shared["rope_parameters"] = whole_rotation(hub, hub.rope_parameters)
    head_dim = getattr(hub, "head_dim", None) or hub.hidden_size // hub.num_attention_heads
    return PolicyConfig(**{"head_dim": head_dim, **shared, **fields})


def write_hub_config(config: PolicyConfig) -> PreTrainedConfig | None:
    """Return the config of the family that `config` is isomorphic to, None where there is none.

    The family of the checkpoint that the model came from is tried first, with all other fields of its config.
    """
    origin = dict(config.hub_config or {})
    if origin:
        name = origin.pop("model_type")
        hub = _written(config, name, {**origin, **{field: getattr(config, field) for field in _TOKENS}})
        if hub is not None:
            return hub
    for name, family in FAMILIES.items():
        shared = {field: getattr(config, field) for field in _SHARED if hasattr(family.config_class, field)}
        shared["rope_parameters"] = dict(config.rope_parameters or {})  # a config may write into it
        hub = _written(config, name, {**shared, **family.to_hub(config)})
        if hub is not None:
            return hub
    return None


def _written(config: PolicyConfig, name: str, fields: Fields) -> PreTrainedConfig | None:
    """Return the named family's config with these fields; None if `config` is of another shape."""
    try:
        family = FAMILIES[name]
        hub = family.config_class(**{**family.for_vllm(config), **fields})
        translated_back = read_hub_config(hub)
    except (StrictDataclassError, ConfigError, KeyError):  # the last: of options of a rotation
        return None
    if translated_back is None:
        return None
    if name == "deepseek_v3" and config.mtp_mlp_layer_type == "sparse":  # a config does not say what its files hold
        translated_back.num_mtp_layers = config.num_mtp_layers
    return hub if _shape(translated_back) == _shape(config) else None


def _shape(config: PolicyConfig) -> Fields:
    """Return the fields that decide which weights a model has and what it computes with them."""
    fields = {name: getattr(config, name) for name in _read_fields(config)}
    biased = bool(config.sparse_layers) and config.has_router_bias
    shared_bias = config.n_shared_experts > 0 and config.mlp_bias
    if all(kind in _RECURRENT or not config.rotates(i) for i, kind in enumerate(config.layer_types or ())):
        fields |= {"rope_parameters": None, "no_rope_layers": None}
    return {**fields, **_meant(config), "router_bias": biased, "shared_bias": shared_bias}


def _read_fields(config: PolicyConfig) -> tuple[str, ...]:
    """Return the fields that a model of a config reads, by the kinds of its feed-forwards."""
    kinds = config.mlp_layer_types or ()
    names = _SHAPE + (_DENSE_SHAPE if "dense" in kinds else ()) + (_SPARSE_SHAPE if "sparse" in kinds else ())
    return names + (_GROUP_SHAPE if "sparse" in kinds and config.topk_method != "greedy" else ())


def _meant(config: PolicyConfig) -> Fields:
    """Return what fields mean whose None, or any value, means the same as another value."""
    attention = [kind for kind in config.layer_types or () if kind not in _RECURRENT]
    is_latent = [kind == "latent_attention" for kind in attention]
    fields: Fields = {}
    query_size = config.head_dim
    if any(is_latent):
        fields["rope_interleave"] = config.rope_interleave is not False
        fields["latent_norm_eps"] = config.latent_norm_eps or config.rms_norm_eps
    if all(is_latent):
        query_size = (config.qk_nope_head_dim or 0) + (config.qk_rope_head_dim or 0)
        fields |= {"head_dim": None, "num_key_value_heads": None}
    if any(is_latent) == all(is_latent) and config.query_pre_attn_scalar == query_size:
        fields["query_pre_attn_scalar"] = None
    return fields
