"""Tiny configs of the blocks that a config may choose, beside the kinds of attention."""

from __future__ import annotations

from typing import Any

BLOCKS: dict[str, dict[str, Any]] = {
    "norms-of-outputs": {"norm_position": "post", "use_qk_norm": True, "qk_norm_scope": "all_heads"},
    "sandwich": {
        "norm_type": "zero_centered_rmsnorm", "norm_position": "sandwich", "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier": 3.3, "query_pre_attn_scalar": 6, "use_qk_norm": True, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"], "rope_local_base_freq": 50.0,
        "final_logit_softcapping": 4.0,
    },
    "parallel": {
        "parallel_attn": True, "norm_type": "layernorm", "mlp_gated": False, "hidden_act": "gelu", "mlp_bias": True,
        "use_qk_norm": True, "qk_norm_scope": "all_heads",
    },
    "fused": {
        "fused_projections": True, "attention_bias": True, "mlp_bias": True, "use_qk_norm": True, "hidden_act": "relu",
    },
    "latent-between-norms": {
        "layer_types": ["latent_attention", "sliding_gated_attention"], "kv_lora_rank": 12, "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4, "v_head_dim": 10, "latent_norm_eps": 1e-2, "norm_type": "layernorm",
        "norm_position": "sandwich", "sliding_window": 5, "rope_local_base_freq": 50.0, "query_pre_attn_scalar": 5.5,
    },
}  # fmt: skip
