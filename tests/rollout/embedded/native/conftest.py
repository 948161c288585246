"""Engines by the native and by the Python step, and models with every shape that the kernels cover."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import RolloutSettings
from alignlab.models.hub.checkpoints import new_model
from alignlab.native.build import COMPILER
from alignlab.native.processor import missing_flags
from alignlab.rollout.embedded.engine import EmbeddedEngine
from tests.rollout.conftest import SIZES, VOCAB

needs_kernels = pytest.mark.skipif(
    shutil.which(COMPILER) is None or bool(missing_flags(torch.float32)), reason="needs g++ and AVX-512"
)
needs_bfloat16 = pytest.mark.skipif(bool(missing_flags(torch.bfloat16)), reason="needs AVX-512 BF16")

MIXTURE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "biases": {"attention_bias": True, "attention_out_bias": False, "mlp_bias": True, "tie_word_embeddings": True},
    "normed-heads": {"use_qk_norm": True, "head_dim": 24},
    "windows-caps": {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 7, "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 8.0,
    },
    "sinks": {"attention_sinks": True, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 5},
    "one-kv-head": {"num_attention_heads": 14, "num_key_value_heads": 1, "head_dim": 10},
    "head-of-80": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 80},
    "head-of-144": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 144},
    "odd": {"hidden_size": 37, "intermediate_size": 51, "num_attention_heads": 3, "num_key_value_heads": 1,
            "head_dim": 9, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0,
                                               "partial_rotary_factor": 2 / 3}},
    "norms-of-outputs": {"norm_position": "post", "use_qk_norm": True, "qk_norm_scope": "all_heads"},
    "sandwich": {
        "norm_type": "zero_centered_rmsnorm", "norm_position": "sandwich", "hidden_act": "gelu_pytorch_tanh",
        "embedding_multiplier": 3.3, "query_pre_attn_scalar": 6, "use_qk_norm": True, "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"], "rope_local_base_freq": 50.0,
    },
    "fused": {"fused_projections": True, "attention_bias": True, "mlp_bias": True, "hidden_act": "relu"},
    "positions-in-one-layer": {"no_rope_layers": [0, 1]},
    "mixture": MIXTURE,
    "mixture-after-dense": {**MIXTURE, "mlp_layer_types": ["dense", "sparse"], "norm_topk_prob": False},
    "sigmoid-shared": {
        **MIXTURE, "scoring_func": "sigmoid", "router_bias": True, "n_shared_experts": 1, "router_in_fp32": True,
        "routed_scaling_factor": 1.7,
    },
    "shared-gate": {
        **MIXTURE, "n_shared_experts": 1, "shared_expert_gate": True, "shared_expert_intermediate_size": 22,
        "norm_position": "sandwich",
    },
}  # fmt: skip

MakeBoth = Callable[..., tuple[EmbeddedEngine, EmbeddedEngine]]


def model_of(shape: str, *, dtype: torch.dtype = torch.float32, std: float = 0.2) -> PreTrainedModel:
    """A model whose weights, norms and biases are all random."""
    torch.manual_seed(3)
    model = new_model({**SIZES, "initializer_range": std, **SHAPES[shape]}, vocab_size=VOCAB)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.dim() == 1 and ("norm" in name or "bias" in name):
                tensor.add_(torch.randn_like(tensor), alpha=0.2)
    return model.to(dtype)


@pytest.fixture
def both(tokenizer: PreTrainedTokenizerFast) -> MakeBoth:
    """Engines of one model by the Python and by the native step; keywords are the settings'."""

    def make(model: PreTrainedModel, **settings: Any) -> tuple[EmbeddedEngine, EmbeddedEngine]:
        python, native = (
            EmbeddedEngine(model, tokenizer, RolloutSettings(native=mode, **settings)) for mode in ("off", "required")
        )
        return python, native

    return make
