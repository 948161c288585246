"""Translations of the configs of Qwen3-Next, Qwen3.5 (text) and Kimi Linear, for `families`."""

from __future__ import annotations

from typing import Any

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.deepseek_families import LATENT, LATENT_EPS
from alignlab.models.hub.family_fields import Fields, balance_coef, require_value

_LINEAR = (
    "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
_HUB_NAMES = {
    "fused_gated_deltanet": "linear_attention", "gated_deltanet": "linear_attention",
    "kimi_delta_attention": "linear_attention", "gated_attention": "full_attention",
    "latent_attention": "full_attention",
}  # fmt: skip
_POSITIONS_IN_SPACE = ("mrope_section", "mrope_interleaved")
"""Rope parameters that mean something for images alone: the positions of text are the same in all directions."""


def read_qwen3_next(hub: Any) -> Fields:
    """Return the fields of a `PolicyConfig` that stand for a `Qwen3NextConfig`.

    Raises:
        ConfigError: the activation is another.
    """
    sparse = [
        index not in hub.mlp_only_layers and hub.num_experts > 0 and (index + 1) % hub.decoder_sparse_step == 0
        for index in range(hub.num_hidden_layers)
    ]
    fields = _read_gated(hub, "fused_gated_deltanet")
    fields["mlp_layer_types"] = ["sparse" if experts else "dense" for experts in sparse]
    if any(sparse):
        fields |= {
            "num_experts": hub.num_experts,
            "num_experts_per_tok": hub.num_experts_per_tok,
            "moe_intermediate_size": hub.moe_intermediate_size,
            "n_shared_experts": 1,
            "shared_expert_intermediate_size": hub.shared_expert_intermediate_size,
            "shared_expert_gate": True,
            "norm_topk_prob": hub.norm_topk_prob,
            "router_aux_loss_coef": balance_coef(hub),
        }
    return fields


def write_qwen3_next(config: PolicyConfig) -> Fields:
    """Return the fields of a `Qwen3NextConfig` that stand for ours."""
    dense = [index for index in range(config.num_hidden_layers) if index not in config.sparse_layers]
    fields = {**_write_gated(config), "mlp_only_layers": dense, "decoder_sparse_step": 1}
    if config.sparse_layers:
        fields |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "shared_expert_intermediate_size": config.shared_expert_size,
            "norm_topk_prob": config.norm_topk_prob,
        }
    return fields


def read_qwen3_5(hub: Any) -> Fields:
    """Return the fields of a `PolicyConfig` that stand for a `Qwen3_5TextConfig`.

    Raises:
        ConfigError: the activation is another.
    """
    return _read_gated(hub, "gated_deltanet")


def write_qwen3_5(config: PolicyConfig) -> Fields:
    """Return the fields of a `Qwen3_5TextConfig` that stand for ours."""
    return _write_gated(config)


def _read_gated(hub: Any, recurrent: str) -> Fields:
    """Return what Qwen3-Next and Qwen3.5 have in common.

    Args:
        recurrent: kind of the recurrent layers.
    """
    require_value(hub, "hidden_act", "silu")
    kinds = {"linear_attention": recurrent, "full_attention": "gated_attention"}
    has_attention = "full_attention" in hub.layer_types
    rope = {name: value for name, value in hub.rope_parameters.items() if name not in _POSITIONS_IN_SPACE}
    if rope.get("partial_rotary_factor") == 1 or not has_attention:
        rope.pop("partial_rotary_factor", None)
    linear = _LINEAR if "linear_attention" in hub.layer_types else ()
    return {
        "layer_types": [kinds[kind] for kind in hub.layer_types],
        "norm_type": "zero_centered_rmsnorm",
        "use_qk_norm": has_attention,
        "attention_bias": has_attention and hub.attention_bias,
        "rope_parameters": rope,
        **{name: getattr(hub, name) for name in linear},
    }


def _write_gated(config: PolicyConfig) -> Fields:
    linear = {name: getattr(config, name) for name in _LINEAR if getattr(config, name) is not None}
    rope = {"partial_rotary_factor": 1.0, **(config.rope_parameters or {})}
    return {
        "head_dim": config.head_dim, "attention_bias": config.attention_bias, "rope_parameters": rope, **linear,
        "layer_types": _layers_of_hub(config),
    }  # fmt: skip


def read_kimi_linear(hub: Any) -> Fields:
    """Return the fields of a `PolicyConfig` that stand for a `KimiLinearConfig`.

    Raises:
        ConfigError: the activation is another, kv heads are not heads, or a layer with experts has no shared one.
    """
    require_value(hub, "hidden_act", "silu")
    require_value(hub, "num_key_value_heads", hub.num_attention_heads)
    kinds = {"linear_attention": "kimi_delta_attention", "full_attention": "latent_attention"}
    layers = [kinds[kind] for kind in hub.layer_types]
    fields: Fields = {
        "layer_types": layers,
        "no_rope_layers": [0] * hub.num_hidden_layers,
        "rope_parameters": None,
        "head_dim": hub.qk_rope_head_dim,
        "attention_bias": "latent_attention" in layers and hub.attention_bias,
        "tie_word_embeddings": False,  # whatever the config says: the class in `transformers` ties nothing
        "mlp_layer_types": list(hub.mlp_layer_types),
    }
    if "latent_attention" in layers:
        fields |= {name: getattr(hub, name) for name in LATENT}
        fields["latent_norm_eps"] = None if hub.rms_norm_eps == LATENT_EPS else LATENT_EPS
    if "kimi_delta_attention" in layers:
        fields |= dict.fromkeys(_LINEAR[:2], hub.linear_num_heads) | dict.fromkeys(_LINEAR[2:4], hub.linear_head_dim)
        fields["linear_conv_kernel_dim"] = hub.linear_conv_kernel_dim
    return fields | (_read_experts(hub) if "sparse" in fields["mlp_layer_types"] else {})


def _read_experts(hub: Any) -> Fields:
    if not hub.n_shared_experts:
        raise ConfigError(
            f"n_shared_experts is {hub.n_shared_experts}, and {hub.model_type} is computed here with shared experts"
        )
    return {
        "num_experts": hub.num_local_experts,
        "num_experts_per_tok": hub.num_experts_per_tok,
        "moe_intermediate_size": hub.moe_intermediate_size,
        "n_shared_experts": hub.n_shared_experts,
        "routed_scaling_factor": hub.routed_scaling_factor,
        "norm_topk_prob": bool(hub.norm_topk_prob),
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": hub.n_group,
        "topk_group": hub.topk_group,
        "router_bias": True,
        "router_in_fp32": True,
    }


def write_kimi_linear(config: PolicyConfig) -> Fields:
    """Return the fields of a `KimiLinearConfig` that stand for ours."""
    fields: Fields = {
        "attention_bias": config.attention_bias,
        "num_key_value_heads": config.num_attention_heads,
        "layer_types": _layers_of_hub(config),
        "mlp_layer_types": config.mlp_layer_types,
        **{name: getattr(config, name) for name in LATENT if getattr(config, name) is not None},
    }
    if config.linear_num_key_heads is not None:
        fields |= {
            "linear_num_heads": config.linear_num_key_heads,
            "linear_head_dim": config.linear_key_head_dim,
            "linear_conv_kernel_dim": config.linear_conv_kernel_dim,
        }
    if config.sparse_layers:
        fields |= {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "n_shared_experts": config.n_shared_experts,
            "routed_scaling_factor": config.routed_scaling_factor,
            "norm_topk_prob": config.norm_topk_prob,
            "n_group": config.n_group,
            "topk_group": config.topk_group,
        }
    return fields


def kimi_for_vllm(config: PolicyConfig) -> Fields:
    """Return the fields of Kimi Linear's own checkpoints, whose layers are counted from 1."""
    layers, feed_forwards = _layers_of_hub(config), config.mlp_layer_types or []
    by_kind = {
        kind: [index + 1 for index, layer in enumerate(layers) if layer == kind]
        for kind in ("linear_attention", "full_attention")
    }
    sizes = {
        "num_heads": config.linear_num_key_heads, "head_dim": config.linear_key_head_dim,
        "short_conv_kernel_size": config.linear_conv_kernel_dim,
    }  # fmt: skip
    return {
        "linear_attn_config": {
            "kda_layers": by_kind["linear_attention"], "full_attn_layers": by_kind["full_attention"],
            **{name: size for name, size in sizes.items() if size is not None},
        },
        "mla_use_nope": True,
        "moe_router_activation_func": "sigmoid",
        "use_grouped_topk": True,
        "moe_layer_freq": 1,
        "first_k_dense_replace": feed_forwards.index("sparse") if "sparse" in feed_forwards else len(feed_forwards),
    }  # fmt: skip


def _layers_of_hub(config: PolicyConfig) -> list[str]:
    """Return the kinds of a config's layers by their names in these families; those that they lack as they are."""
    return [_HUB_NAMES.get(kind, kind) for kind in config.layer_types or ()]
