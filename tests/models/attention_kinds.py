"""Tiny configs with layers of each kind of attention, and of each block."""

from __future__ import annotations

from typing import Any

import torch

from alignlab.models.config import PolicyConfig
from alignlab.models.transformer import PolicyForCausalLM
from tests.models.block_kinds import BLOCKS

SHAPE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3, "max_position_embeddings": 128,
}
LATENT: dict[str, Any] = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 10}
RECURRENT: dict[str, Any] = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 4,
}  # fmt: skip
KIMI: dict[str, Any] = {**RECURRENT, "linear_num_value_heads": 2, "linear_value_head_dim": 8}
PARTIAL: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
WINDOWS: dict[str, Any] = {"sliding_window": 5, "attn_logit_softcapping": 3.0}
KINDS: dict[str, dict[str, Any]] = {
    "latent": {"layer_types": ["latent_attention"] * 2, **LATENT, "q_lora_rank": 16},
    "latent-plain-query": {"layer_types": ["latent_attention"] * 2, **LATENT, "rope_interleave": False},
    "latent-without-positions": {"layer_types": ["latent_attention"] * 2, **LATENT, "no_rope_layers": [0, 0]},
    "latent-sinks-soft-cap": {
        "layer_types": ["latent_attention", "full_attention"], **LATENT, "attention_sinks": True,
        "attn_logit_softcapping": 3.0,
    },
    "gated": {"layer_types": ["gated_attention"] * 2, "use_qk_norm": True, "attention_bias": True},
    "gated-window": {"layer_types": ["sliding_gated_attention", "gated_attention"], **WINDOWS},
    "partial-rotation": {"rope_parameters": PARTIAL, "use_qk_norm": True},
    "no-positions": {"no_rope_layers": [1, 0]},
    "sinks": {"attention_sinks": True, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
    "mixture-of-heads": {
        "layer_types": ["mixture_of_heads"] * 2, "num_key_value_heads": 1, "num_attention_heads": 2,
        "num_attention_experts": 6, "use_qk_norm": True, "attention_router_aux_loss_coef": 0.01,
    },
    "mixture-of-heads-and-experts": {
        "num_hidden_layers": 3, "layer_types": ["mixture_of_heads", "full_attention", "gated_deltanet"], **RECURRENT,
        "num_key_value_heads": 1, "num_attention_heads": 3, "num_attention_experts": 4, "num_experts": 5,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "biased-experts": {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5, "attention_sinks": True,
        "attention_bias": True, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "expert_bias": True, "router_linear_bias": True, "swiglu_limit": 1.5, "swiglu_alpha": 1.3,
    },
    "shared-layers": {
        "num_hidden_layers": 4, "shared_layers": [0, 1, 0, 1], "use_qk_norm": True, "attention_sinks": True,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5,
    },
    "shared-recurrent-and-latent": {
        "num_hidden_layers": 4, "shared_layers": [0, 0, 1, 1], **RECURRENT, **LATENT,
        "layer_types": ["gated_deltanet"] * 2 + ["latent_attention"] * 2,
    },
    "gated-deltanet": {"layer_types": ["gated_deltanet"] * 2, **RECURRENT},
    "fused-gated-deltanet": {"layer_types": ["fused_gated_deltanet"] * 2, **RECURRENT, "linear_conv_kernel_dim": 2},
    "kimi-delta": {"layer_types": ["kimi_delta_attention"] * 2, **KIMI},
    "qwen3-next": {
        "num_hidden_layers": 4, "layer_types": ["fused_gated_deltanet"] * 3 + ["gated_attention"], **RECURRENT,
        "use_qk_norm": True, "rope_parameters": PARTIAL,
    },
    "kimi-linear": {
        "num_hidden_layers": 4, "layer_types": ["kimi_delta_attention"] * 3 + ["latent_attention"], **KIMI, **LATENT,
        "no_rope_layers": [0, 0, 0, 0],
    },
    "all": {
        "num_hidden_layers": 8, "layer_types": [
            "full_attention", "sliding_attention", "gated_attention", "sliding_gated_attention", "latent_attention",
            "gated_deltanet", "fused_gated_deltanet", "kimi_delta_attention",
        ], **LATENT, "q_lora_rank": 16, **KIMI, "attention_sinks": True, "no_rope_layers": [1, 1, 0, 1, 1, 1, 1, 1],
        "rope_parameters": PARTIAL, **WINDOWS,
    },
    **BLOCKS,
}  # fmt: skip


def make_model(kind: str, *, vocab_size: int = 50, attention: str = "alignlab", **changes: Any) -> PolicyForCausalLM:
    """Return a random model of a kind, in evaluation mode, whose norms, biases and sinks are not what they start as.

    The rates and biases of recurrent decays are what they start as, so that states last for some tokens.
    """
    torch.manual_seed(0)
    config = PolicyConfig(**{**SHAPE, **KINDS[kind], "vocab_size": vocab_size, **changes})
    config._attn_implementation = attention
    model = PolicyForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1 and not name.endswith(("A_log", "dt_bias")):
            torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model.eval()
