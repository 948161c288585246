"""Architectures by name, each from a paper: their fields at any size, for models trained from nothing.

    preset_config("qwen3_next", vocab_size=512, hidden_size=128)

The sizes of a preset follow from `hidden_size`, `num_hidden_layers`, `num_attention_heads` and `intermediate_size`,
which any preset may be given, as all other fields of `PolicyConfig`. They are small unless given.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.config_rules import require, require_size

Fields = dict[str, Any]

SIZES: Fields = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 176,
    "max_position_embeddings": 4096,
}  # fmt: skip
"""Sizes that a preset has unless it is given others."""
WINDOW = 128
"""Tokens that layers with a window see unless `sliding_window` is given."""


@dataclass(frozen=True)
class Preset:
    """An architecture.

    Attributes:
        summary: what it is, in a line.
        paper: where it comes from, an arXiv number.
        fields: fields of a `PolicyConfig` from sizes, which hold those of `SIZES` and what the caller gave.
    """

    summary: str
    paper: str
    fields: Callable[[Fields], Fields]


def preset_names() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(PRESETS)


def preset_fields(name: str, **changes: Any) -> Fields:
    """Return the fields of a preset's `PolicyConfig`, without the vocabulary.

    Args:
        name: of the preset.
        changes: fields that are other than the preset has them.

    Raises:
        ConfigError: there is no such preset, or a size is none.
    """
    preset = PRESETS.get(name) if isinstance(name, str) else None
    if preset is None:
        near = difflib.get_close_matches(str(name), PRESETS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(preset_names())}"
        raise ConfigError(f"preset is {name!r}, and there is none of this name; {hint}")
    sizes = SIZES | changes
    for size, default in SIZES.items():
        require_size(size, sizes[size], default)
    if sizes.get("head_dim") is not None:
        require_size("head_dim", sizes["head_dim"], 16)
    return {**SIZES, **preset.fields(sizes), **changes}


def preset_config(name: str, *, vocab_size: int, **changes: Any) -> PolicyConfig:
    """Return the config of a preset.

    Args:
        name: of the preset.
        vocab_size: ids that the model reads and writes.
        changes: fields that are other than the preset has them.

    Raises:
        ConfigError: there is no such preset, a field has a value of another type, or the preset's pieces and the
            changes exclude each other.
    """
    try:
        return PolicyConfig(**preset_fields(name, **changes), vocab_size=vocab_size)
    except StrictDataclassError as error:
        raise ConfigError(f"preset {name}: {error}") from error


def pattern(kinds: Sequence[str], num_layers: int) -> list[str]:
    """Return the kinds of layers, again and again, with the last kind in the last layer.

    Raises:
        ConfigError: there is one layer.
    """
    require(
        num_layers >= 2,
        f"num_hidden_layers is {num_layers}, and must be at least 2 in a preset that has layers of {kinds[0]} and of "
        f"{kinds[-1]}; use {len(kinds)}",
    )
    layers = [kinds[index % len(kinds)] for index in range(num_layers)]
    return [*layers[:-1], kinds[-1]]


def _head(sizes: Fields) -> int:
    """Size of a head, even, so that it can be rotated."""
    return int(sizes.get("head_dim") or max(2, sizes["hidden_size"] // sizes["num_attention_heads"] // 2 * 2))


def _grouped(sizes: Fields) -> Fields:
    """Grouped-query attention: two query heads a kv head where they divide."""
    heads = sizes["num_attention_heads"]
    return {"num_key_value_heads": heads // 2 if heads % 2 == 0 else heads, "head_dim": _head(sizes)}


def _latent(sizes: Fields) -> Fields:
    head = _head(sizes)
    return {
        "layer_types": ["latent_attention"] * sizes["num_hidden_layers"], "kv_lora_rank": 2 * head,
        "q_lora_rank": 3 * head, "qk_nope_head_dim": head, "qk_rope_head_dim": max(2, head // 4 * 2),
        "v_head_dim": head,
    }  # fmt: skip


def _recurrent(sizes: Fields, kind: str, *, values: int = 2) -> Fields:
    """Recurrent layers everywhere; each key head serves `values` value heads."""
    heads, head = sizes["num_attention_heads"], _head(sizes)
    return {
        "layer_types": [kind] * sizes["num_hidden_layers"], "linear_num_key_heads": heads // values or 1,
        "linear_num_value_heads": (heads // values or 1) * values, "linear_key_head_dim": head,
        "linear_value_head_dim": head, "linear_conv_kernel_dim": 4,
    }  # fmt: skip


def _experts(sizes: Fields, **fields: Any) -> Fields:
    """8 experts of which 2 compute a token: together as wide as the dense feed-forward, in multiples of 8."""
    width = max(8, sizes["intermediate_size"] // 2 // 8 * 8)
    return _grouped(sizes) | {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": width, "router_aux_loss_coef": 0.01,
    } | fields  # fmt: skip


def _gemma(sizes: Fields) -> Fields:
    return _grouped(sizes) | {
        "hidden_act": "gelu_pytorch_tanh", "norm_type": "zero_centered_rmsnorm", "norm_position": "sandwich",
        "embedding_multiplier": sizes["hidden_size"] ** 0.5, "tie_word_embeddings": True,
        "sliding_window": sizes.get("sliding_window", WINDOW),
    }  # fmt: skip


def _gemma2(sizes: Fields) -> Fields:
    layers = pattern(("sliding_attention", "full_attention"), sizes["num_hidden_layers"])
    return _gemma(sizes) | {
        "layer_types": layers, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip


def _gemma3(sizes: Fields) -> Fields:
    layers = pattern(("sliding_attention",) * 5 + ("full_attention",), sizes["num_hidden_layers"])
    return _gemma(sizes) | {
        "layer_types": layers, "use_qk_norm": True, "rope_local_base_freq": 10_000.0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }  # fmt: skip


def _qwen3_next(sizes: Fields) -> Fields:
    layers = pattern(("fused_gated_deltanet",) * 3 + ("gated_attention",), sizes["num_hidden_layers"])
    rope = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    fields = _recurrent(sizes, "fused_gated_deltanet") | _experts(
        sizes, n_shared_experts=1, shared_expert_gate=True, layer_types=layers, use_qk_norm=True,
        norm_type="zero_centered_rmsnorm", router_aux_loss_coef=0.001,
    )
    return fields | {"head_dim": -(-_head(sizes) // 8) * 8, "rope_parameters": rope}


def _kimi_linear(sizes: Fields) -> Fields:
    count = sizes["num_hidden_layers"]
    layers = pattern(("kimi_delta_attention",) * 3 + ("latent_attention",), count)
    experts = _experts(
        sizes, n_shared_experts=1, mlp_layer_types=["dense"] + ["sparse"] * (count - 1), scoring_func="sigmoid",
        router_aux_loss_coef=0.0, router_bias_update_rate=0.001, topk_method="noaux_tc", n_group=1, topk_group=1,
        router_in_fp32=True,
    )
    fields = _latent(sizes) | _recurrent(sizes, "kimi_delta_attention", values=1) | experts
    return fields | {"q_lora_rank": None, "layer_types": layers, "no_rope_layers": [0] * count}


def _deepseek_v3(sizes: Fields) -> Fields:
    experts = _experts(
        sizes, n_shared_experts=1, mlp_layer_types=["dense"] + ["sparse"] * (sizes["num_hidden_layers"] - 1),
        scoring_func="sigmoid", topk_method="noaux_tc", n_group=4, topk_group=2, router_aux_loss_coef=0.0,
        router_bias_update_rate=0.001, router_seq_aux_loss_coef=1e-4, routed_scaling_factor=2.5,
        router_in_fp32=True,
    )
    return experts | _latent(sizes)


def _mixture_of_heads(sizes: Fields) -> Fields:
    heads, head = sizes["num_attention_heads"], -(-_head(sizes) // 8) * 8
    return {
        "layer_types": ["mixture_of_heads"] * sizes["num_hidden_layers"], "num_key_value_heads": 1, "head_dim": head,
        "num_attention_experts": 2 * heads, "attention_router_aux_loss_coef": 0.01,
    }  # fmt: skip


def _sinks(sizes: Fields) -> Fields:
    layers = pattern(("sliding_attention", "full_attention"), sizes["num_hidden_layers"])
    window = sizes.get("sliding_window", WINDOW)
    return _grouped(sizes) | {"layer_types": layers, "sliding_window": window, "attention_sinks": True}


def _gpt_oss(sizes: Fields) -> Fields:
    rope = {
        "rope_type": "yarn", "rope_theta": 150_000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    }  # fmt: skip
    return _experts(sizes, expert_bias=True, router_linear_bias=True, swiglu_limit=7.0) | _sinks(sizes) | {
        "attention_bias": True, "rope_parameters": rope, "max_position_embeddings": 131_072,
    }  # fmt: skip


PRESETS: dict[str, Preset] = {
    "gqa": Preset("grouped-query attention, pre-norm, SwiGLU", "2305.13245", _grouped),
    "olmo2": Preset(
        "norms after each sublayer, and of all queries and keys of a token", "2501.00656",
        lambda sizes: {"norm_position": "post", "use_qk_norm": True, "qk_norm_scope": "all_heads"},
    ),
    "parallel": Preset(
        "attention and feed-forward in parallel", "2204.02311", lambda sizes: _grouped(sizes) | {"parallel_attn": True}
    ),
    "gemma2": Preset("windows 1:1, soft-caps, GeGLU, four norms a layer", "2408.00118", _gemma2),
    "gemma3": Preset("windows 5:1 with a rotation of their own, GeGLU, four norms a layer", "2503.19786", _gemma3),
    "sinks": Preset("attention sinks, windows 1:1", "2508.10925", _sinks),
    "gpt_oss": Preset(
        "attention sinks, windows 1:1, experts and routers with biases, clamped SwiGLU", "2508.10925", _gpt_oss
    ),
    "mla": Preset("multi-head latent attention", "2405.04434", _latent),
    "gated_attention": Preset(
        "a gate on each number of attention's output", "2505.06708",
        lambda sizes: _grouped(sizes) | {"layer_types": ["gated_attention"] * sizes["num_hidden_layers"]},
    ),
    "gated_deltanet": Preset(
        "Gated DeltaNet in all layers", "2412.06464", lambda sizes: _recurrent(sizes, "gated_deltanet")
    ),
    "kda": Preset(
        "Kimi Delta Attention in all layers", "2510.26692",
        lambda sizes: _recurrent(sizes, "kimi_delta_attention", values=1),
    ),
    "moa": Preset("each token takes half of the heads, by a router", "2210.05144", _mixture_of_heads),
    "shared_layers": Preset(
        "each two neighbouring layers share their weights", "2402.14905",
        lambda sizes: _grouped(sizes) | {"shared_layers": [i // 2 for i in range(sizes["num_hidden_layers"])]},
    ),
    "mtp": Preset(
        "a layer that predicts the token after the next", "2412.19437",
        lambda sizes: _grouped(sizes) | {"num_mtp_layers": 1},
    ),
    "qwen3_next": Preset("3 Gated DeltaNet to 1 gated attention, a gated shared expert", "2412.06464", _qwen3_next),
    "kimi_linear": Preset("3 Kimi Delta Attention to 1 latent attention, experts", "2510.26692", _kimi_linear),
    "deepseek_v3": Preset("latent attention, experts in groups, balanced without a loss", "2412.19437", _deepseek_v3),
    "moe": Preset("experts, softmax top-k with Switch's balance loss", "2101.03961", _experts),
    "noisy_topk": Preset(
        "experts chosen under noise, importance and load balanced", "1701.06538",
        lambda sizes: _experts(
            sizes, router_type="noisy_topk", router_aux_loss_coef=0.0, router_importance_loss_coef=0.01,
            router_load_loss_coef=0.01,
        ),
    ),
    "hash": Preset(
        "experts by a table of tokens", "2106.04426",
        lambda sizes: _experts(sizes, router_type="hash", router_aux_loss_coef=0.0),
    ),
    "base_assignment": Preset(
        "one expert a token, by balanced linear assignment", "2103.16716",
        lambda sizes: _experts(
            sizes, router_type="base", scoring_func="sigmoid", norm_topk_prob=False, num_experts_per_tok=1,
            router_aux_loss_coef=0.0,
        ),
    ),
    "sinkhorn": Preset(
        "experts by Sinkhorn's balanced plan", "2202.01169",
        lambda sizes: _experts(sizes, router_type="sinkhorn", router_aux_loss_coef=0.0),
    ),
    "expert_choice": Preset(
        "experts choose their tokens: for SFT and distillation alone", "2202.09368",
        lambda sizes: _experts(sizes, router_type="expert_choice", norm_topk_prob=False, router_aux_loss_coef=0.0),
    ),
    "reinforce": Preset(
        "a router learnt by REINFORCE", "1511.06297",
        lambda sizes: _experts(sizes, router_type="reinforce", router_reinforce_coef=0.01),
    ),
    "capacity": Preset(
        "experts of limited capacity, which drop tokens", "2006.16668",
        lambda sizes: _experts(sizes, capacity_factor=1.25),
    ),
}
"""By name."""
