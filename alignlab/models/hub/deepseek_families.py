"""Translations of the configs of DeepSeek-V2 and DeepSeek-V3, for `families`."""

from __future__ import annotations

from typing import Any

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.family_fields import Fields, require_value

LATENT = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
LATENT_EPS = 1e-6
"""Epsilon of the norms of latents in both families, whatever `rms_norm_eps` is."""


def read_deepseek_v2(hub: Any) -> Fields:
    """Return the fields of a `PolicyConfig` that stand for a `DeepseekV2Config`.

    Raises:
        ConfigError: the config asks for something that `transformers` computes otherwise, or that ours lacks.
    """
    require_value(hub, "scoring_func", "softmax")
    require_value(hub, "topk_method", "greedy", "group_limited_greedy")
    require_value(hub, "norm_topk_prob", False)  # `transformers` ignores it
    fields = _read(hub)
    if hub.mlp_bias and "sparse" in fields["mlp_layer_types"]:
        raise ConfigError("mlp_bias is true, and shared experts are computed here without biases")
    fields["mlp_bias"] = hub.mlp_bias
    if "sparse" in fields["mlp_layer_types"]:
        fields |= {"topk_method": hub.topk_method, "norm_topk_prob": False}
        if hub.topk_method == "group_limited_greedy":
            fields |= {"n_group": hub.n_group, "topk_group": hub.topk_group}
    return fields


def write_deepseek_v2(config: PolicyConfig) -> Fields:
    """Return the fields of a `DeepseekV2Config` that stand for ours."""
    return {
        **_write(config), "mlp_bias": config.mlp_bias, "topk_method": config.topk_method, "norm_topk_prob": False,
    }  # fmt: skip


def read_deepseek_v3(hub: Any) -> Fields:
    """Return the fields of a `PolicyConfig` that stand for a `DeepseekV3Config`.

    Its balancing bias stays as the checkpoint has it, until the config is given a `router_bias_update_rate`.

    Raises:
        ConfigError: the config asks for something that `transformers` computes otherwise, or that ours lacks.
    """
    require_value(hub, "scoring_func", "sigmoid")
    require_value(hub, "topk_method", "noaux_tc")
    fields = _read(hub) | {"rope_interleave": bool(hub.rope_interleave)}
    if "sparse" in fields["mlp_layer_types"]:
        fields |= {
            "router_bias": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "n_group": hub.n_group,
            "topk_group": hub.topk_group,
            "norm_topk_prob": bool(hub.norm_topk_prob),
        }
    return fields


def write_deepseek_v3(config: PolicyConfig) -> Fields:
    """Return the fields of a `DeepseekV3Config` that stand for ours."""
    return {
        **_write(config),
        "rope_interleave": config.rope_interleave is not False,
        "norm_topk_prob": config.norm_topk_prob,
        "num_mtp_layers": config.num_mtp_layers,
    }


def v3_for_vllm(config: PolicyConfig) -> Fields:
    """Return what vLLM reads of the router, and takes for softmax without a bias where it is missing."""
    return {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}


def _read(hub: Any) -> Fields:
    """Return what both families have in common.

    Raises:
        ConfigError: kv heads are not heads, a layer with experts has no shared one, or layers alternate.
    """
    require_value(hub, "num_key_value_heads", hub.num_attention_heads)
    require_value(hub, "moe_layer_freq", 1)
    num_dense = min(hub.first_k_dense_replace or 0, hub.num_hidden_layers)
    num_sparse = hub.num_hidden_layers - num_dense
    if num_sparse and not hub.n_shared_experts:
        raise ConfigError(
            f"n_shared_experts is {hub.n_shared_experts}, and {hub.model_type} is computed here with shared experts"
        )
    fields = {
        **{name: getattr(hub, name) for name in LATENT},
        "head_dim": hub.qk_rope_head_dim,
        "attention_bias": hub.attention_bias,
        "layer_types": ["latent_attention"] * hub.num_hidden_layers,
        "mlp_layer_types": ["dense"] * num_dense + ["sparse"] * num_sparse,
        "latent_norm_eps": None if hub.rms_norm_eps == LATENT_EPS else LATENT_EPS,
    }
    return fields | (_read_experts(hub) if num_sparse else {})


def _read_experts(hub: Any) -> Fields:
    return {
        "num_experts": hub.n_routed_experts,
        "num_experts_per_tok": hub.num_experts_per_tok,
        "moe_intermediate_size": hub.moe_intermediate_size,
        "n_shared_experts": hub.n_shared_experts,
        "routed_scaling_factor": hub.routed_scaling_factor,
        "router_in_fp32": True,
    }


def _write(config: PolicyConfig) -> Fields:
    layers = config.mlp_layer_types or []
    sizes: Fields = {name: getattr(config, name) for name in LATENT}
    fields: Fields = {
        "attention_bias": config.attention_bias,
        "num_key_value_heads": config.num_attention_heads,
        "first_k_dense_replace": layers.index("sparse") if "sparse" in layers else len(layers),
    }
    if config.sparse_layers:
        fields |= {
            "n_routed_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "moe_intermediate_size": config.moe_intermediate_size,
            "n_shared_experts": config.n_shared_experts,
            "routed_scaling_factor": config.routed_scaling_factor,
            "n_group": config.n_group,
            "topk_group": config.topk_group,
        }
    return sizes | fields
