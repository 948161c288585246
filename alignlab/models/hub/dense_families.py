"""Translations of the configs of Gemma 2, Gemma 3 (text), OLMo 2 and Phi-3, for `families`."""

from __future__ import annotations

from typing import Any

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.family_fields import (
    Fields,
    read_one_window,
    read_windows,
    require_value,
    whole_rotation,
)

_LOCAL_BASE = 10_000.0  # of Gemma 3's layers with a window, where none is given
_WINDOW = 4096  # of Gemma's config where no layer has one: `transformers` makes the mask all the same


def _read_gemma(hub: Any) -> Fields:
    require_value(hub, "use_bidirectional_attention", False)
    return {
        "hidden_act": hub.hidden_activation,
        "norm_type": "zero_centered_rmsnorm",
        "norm_position": "sandwich",
        "embedding_multiplier": hub.hidden_size**0.5,
        "query_pre_attn_scalar": hub.query_pre_attn_scalar,
        "attention_bias": hub.attention_bias,
        "final_logit_softcapping": hub.final_logit_softcapping,
        **read_windows(hub),
    }


def _write_gemma(config: PolicyConfig) -> Fields:
    return {
        "hidden_activation": config.hidden_act,
        "head_dim": config.head_dim,
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": config.query_pre_attn_scalar or config.head_dim,
        "final_logit_softcapping": config.final_logit_softcapping,
        "attn_logit_softcapping": config.attn_logit_softcapping,
        "layer_types": config.layer_types,
        "sliding_window": config.sliding_window or _WINDOW,
    }


def read_gemma2(hub: Any) -> Fields:
    """Return the fields of a `PolicyConfig` that stand for a `Gemma2Config`."""
    return {**_read_gemma(hub), "attn_logit_softcapping": hub.attn_logit_softcapping}


def write_gemma2(config: PolicyConfig) -> Fields:
    """Return the fields of a `Gemma2Config` that stand for ours."""
    return _write_gemma(config)


def read_gemma3(hub: Any) -> Fields:
    """Return the fields of a `PolicyConfig` that stand for a `Gemma3TextConfig`.

    Raises:
        ConfigError: attention has a soft-cap, which `transformers` does not compute for this family, or layers with a
            window have rotations that are scaled.
    """
    require_value(hub, "attn_logit_softcapping")
    local = whole_rotation(hub, hub.rope_parameters["sliding_attention"])
    if local["rope_type"] != "default":
        raise ConfigError(
            f"rope_type of sliding_attention is {local['rope_type']!r}, and gemma3_text is computed here with "
            "'default' alone in layers with a window"
        )
    windowed = "sliding_attention" in hub.layer_types
    return {
        **_read_gemma(hub),
        "use_qk_norm": True,
        "rope_parameters": whole_rotation(hub, hub.rope_parameters["full_attention"]),
        "rope_local_base_freq": local["rope_theta"] if windowed else None,
    }


def write_gemma3(config: PolicyConfig) -> Fields:
    """Return the fields of a `Gemma3TextConfig` that stand for ours."""
    local = {"rope_type": "default", "rope_theta": config.rope_local_base_freq or _LOCAL_BASE}
    rope = {"full_attention": dict(config.rope_parameters or {}), "sliding_attention": local}
    return {**_write_gemma(config), "rope_parameters": rope}


def read_olmo2(hub: Any) -> Fields:
    """Return the fields of a `PolicyConfig` that stand for an `Olmo2Config`."""
    return {
        "norm_position": "post",
        "use_qk_norm": True,
        "qk_norm_scope": "all_heads",
        "attention_bias": hub.attention_bias,
    }


def write_olmo2(config: PolicyConfig) -> Fields:
    """Return the fields of an `Olmo2Config` that stand for ours."""
    return {"attention_bias": config.attention_bias}


def read_phi3(hub: Any) -> Fields:
    """Return the fields of a `PolicyConfig` that stand for a `Phi3Config`, those of Phi-4 too.

    Under LongRoPE, sequences have at most `original_max_position_embeddings` tokens, see `rope`.

    Raises:
        ConfigError: the embeddings have dropout.
    """
    require_value(hub, "embd_pdrop", 0.0)
    rope = dict(hub.rope_parameters)
    if rope.get("partial_rotary_factor") == 1:
        del rope["partial_rotary_factor"]
    fields = {"fused_projections": True, "residual_dropout": hub.resid_pdrop, **read_one_window(hub)}
    if rope["rope_type"] == "longrope":
        limit = rope["original_max_position_embeddings"]
        rope["factor"] = rope.get("factor") or hub.max_position_embeddings / limit
        fields["max_position_embeddings"] = min(hub.max_position_embeddings, limit)
    return {**fields, "rope_parameters": rope}


def write_phi3(config: PolicyConfig) -> Fields:
    """Return the fields of a `Phi3Config` that stand for ours."""
    rope = config.rope_parameters or {}
    fields: Fields = {"sliding_window": config.sliding_window, "resid_pdrop": config.residual_dropout}
    if rope.get("rope_type") == "longrope":
        limit = rope["original_max_position_embeddings"]
        fields |= {
            "original_max_position_embeddings": limit, "max_position_embeddings": round(rope["factor"] * limit)
        }  # fmt: skip
    return fields
