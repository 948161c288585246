"""Configs of Hub families: new models of ours that stand for one, and features that ours lacks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
)

from alignlab.errors import ConfigError
from alignlab.models.hub.checkpoints import load_model, new_model, save_model
from alignlab.models.hub.export import checkpoint_shapes, streamed_tensors
from alignlab.models.hub.families import FAMILIES, read_hub_config, write_hub_config
from alignlab.models.transformer import PolicyForCausalLM
from tests.models.test_checkpoints import hub_folder, weights
from tests.models.test_parity import GEMMA, GEMMA3_ROPE, GROUPS, HUB, LATENT, SIZES, YARN, randomize

TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.3,
}
TOKENS = torch.arange(3, 21).view(2, 9)
GEMMA_BLOCKS: dict[str, Any] = {
    "norm_type": "zero_centered_rmsnorm", "norm_position": "sandwich", "embedding_multiplier": 4.0,
    "hidden_act": "gelu_pytorch_tanh",
}
WINDOW: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}
LATENT_BLOCKS: dict[str, Any] = {
    "layer_types": ["latent_attention"] * 2, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse"], "router_in_fp32": True,
}
V3_ROUTER: dict[str, Any] = {
    "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1, "router_bias": True,
}
V2_ROUTER: dict[str, Any] = {"norm_topk_prob": False, "router_bias": False}
NEW: list[tuple[dict[str, Any], str]] = [
    ({"hidden_act": "gelu"}, "llama"),
    ({"norm_position": "post", "use_qk_norm": True, "qk_norm_scope": "all_heads"}, "olmo2"),
    ({"norm_position": "post", "use_qk_norm": True}, "alignlab_policy"),
    ({"fused_projections": True}, "phi3"),
    ({"fused_projections": True, "sliding_window": 3, "layer_types": ["sliding_attention"] * 2}, "phi3"),
    ({"fused_projections": True, **WINDOW}, "alignlab_policy"),
    (GEMMA_BLOCKS, "gemma2"),
    ({**GEMMA_BLOCKS, **WINDOW, "query_pre_attn_scalar": 5, "head_dim": 12}, "gemma2"),
    ({**GEMMA_BLOCKS, **WINDOW, "use_qk_norm": True, "rope_local_base_freq": 77.0}, "gemma3_text"),
    ({**GEMMA_BLOCKS, **WINDOW, "use_qk_norm": True}, "alignlab_policy"),
    ({**GEMMA_BLOCKS, "embedding_multiplier": 3.0}, "alignlab_policy"),
    ({**GEMMA_BLOCKS, "norm_type": "rmsnorm"}, "alignlab_policy"),
    ({**GEMMA_BLOCKS, "mlp_gated": False}, "alignlab_policy"),
    ({"parallel_attn": True}, "alignlab_policy"),
    ({"norm_type": "layernorm"}, "alignlab_policy"),
    (LATENT_BLOCKS, "deepseek_v3"),
    ({**LATENT_BLOCKS, "rms_norm_eps": 1e-5}, "alignlab_policy"),
    ({**LATENT_BLOCKS, "rms_norm_eps": 1e-5, "latent_norm_eps": 1e-6, "rope_interleave": False}, "deepseek_v3"),
    ({**LATENT_BLOCKS, **EXPERTS, **V3_ROUTER, "q_lora_rank": 8}, "deepseek_v3"),
    ({**LATENT_BLOCKS, **EXPERTS, **V3_ROUTER, "router_bias": False, "router_bias_update_rate": 0.1}, "deepseek_v3"),
    ({**LATENT_BLOCKS, **EXPERTS, **V3_ROUTER, "router_bias": False}, "alignlab_policy"),
    ({**LATENT_BLOCKS, **EXPERTS, **V3_ROUTER, "router_in_fp32": False}, "alignlab_policy"),
    ({**LATENT_BLOCKS, **EXPERTS, **V3_ROUTER, "mlp_layer_types": ["sparse", "dense"]}, "alignlab_policy"),
    ({**LATENT_BLOCKS, **EXPERTS, **V2_ROUTER}, "deepseek_v2"),
    (
        {**LATENT_BLOCKS, **EXPERTS, **V2_ROUTER, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1},
        "deepseek_v2",
    ),
    ({**LATENT_BLOCKS, **EXPERTS, **V2_ROUTER, "rope_interleave": False}, "alignlab_policy"),
]  # fmt: skip


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(("changes", "model_type"), NEW, ids=lambda value: value if isinstance(value, str) else "")
def test_a_new_model_is_written_as_its_family(changes: dict[str, Any], model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = new_model({**TINY, **changes}, vocab_size=30, eos_token_id=2, pad_token_id=0)
    randomize(model)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (type(theirs) is PolicyForCausalLM) == (model_type not in FAMILIES)
    ours = load_model(str(tmp_path), dtype=torch.float32)
    assert type(ours) is PolicyForCausalLM
    for other in (ours, theirs):
        torch.testing.assert_close(logits(other), logits(model))


@pytest.mark.parametrize("name", HUB)
def test_a_config_comes_back_from_ours_without_the_hub_s(name: str) -> None:
    """The family is found by the shape alone, and its config stands for the same shape of ours."""
    hub = HUB[name]()
    config = read_hub_config(hub)
    assert config is not None and config.hub_config is None
    written = write_hub_config(config)
    assert written is not None and written.model_type == hub.model_type
    again = read_hub_config(written)
    assert again is not None and again.to_dict() == config.to_dict()


@pytest.mark.parametrize("name", HUB)
def test_weights_in_memory_have_the_names_and_values_of_the_checkpoint(name: str, tmp_path: Path) -> None:
    """As an engine gets them, one layer at a time."""
    hub_folder(name, tmp_path)
    ours: Any = load_model(str(tmp_path), dtype=torch.float32)
    streamed, saved = dict(streamed_tensors(ours)), weights(tmp_path)
    assert streamed.keys() == saved.keys() == checkpoint_shapes(ours).keys()
    assert all(torch.equal(streamed[key], saved[key]) for key in saved)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("deepseek-v3", {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}),
        ("kimi-linear", {
            "linear_attn_config": {
                "kda_layers": [1, 3], "full_attn_layers": [2], "num_heads": 4, "head_dim": 8,
                "short_conv_kernel_size": 4,
            },
            "mla_use_nope": True, "moe_router_activation_func": "sigmoid", "use_grouped_topk": True,
            "moe_layer_freq": 1, "first_k_dense_replace": 1,
        }),
    ],
)  # fmt: skip
def test_fields_that_vllm_reads_and_transformers_does_not_are_written(
    name: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    hub_folder(name, tmp_path / "theirs")
    save_model(load_model(str(tmp_path / "theirs"), dtype=torch.float32), tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert {key: written.get(key) for key in fields} == fields


LOCAL_ROPE = {**GEMMA3_ROPE, "sliding_attention": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}}
LLAMA_LONG_ROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4, "factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
V3: dict[str, Any] = {**LATENT, **GROUPS}
UNKNOWN: dict[str, tuple[Callable[[], PreTrainedConfig], str]] = {
    "rope type": (lambda: LlamaConfig(**SIZES, rope_parameters={**YARN, "rope_type": "dynamic"}), "rope_type is"),
    "activation": (lambda: Gemma2Config(**GEMMA, hidden_activation="relu2"), "hidden_act is 'relu2'"),
    "both directions": (
        lambda: Gemma2Config(**GEMMA, use_bidirectional_attention=True), "use_bidirectional_attention is True"
    ),
    "soft-cap": (lambda: Gemma3TextConfig(**GEMMA, attn_logit_softcapping=3.0), "attn_logit_softcapping is 3.0"),
    "local rope": (
        lambda: Gemma3TextConfig(**GEMMA, rope_parameters=LOCAL_ROPE), "rope_type of sliding_attention is 'linear'"
    ),
    "dropout": (lambda: Phi3Config(**SIZES, embd_pdrop=0.1), "embd_pdrop is 0.1, and phi3 is computed here with 0.0"),
    "longrope": (
        lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA_LONG_ROPE, max_position_embeddings=256),
        "max_position_embeddings is 256, and must be at most original_max_position_embeddings \\(64\\) with",
    ),
    "scores": (lambda: DeepseekV3Config(**V3, scoring_func="softmax"), "scoring_func is softmax"),
    "alternating": (lambda: DeepseekV3Config(**V3, moe_layer_freq=2), "moe_layer_freq is 2, and deepseek_v3"),
    "not shared": (lambda: DeepseekV3Config(**V3, n_shared_experts=0), "n_shared_experts is 0, and deepse"),
    "kv heads": (lambda: DeepseekV3Config(**{**V3, "num_key_value_heads": 2}), "num_key_value_heads is 2"),
    "normalised": (lambda: DeepseekV2Config(**LATENT, norm_topk_prob=True), "norm_topk_prob is True, and deepseek_v2"),
    "method": (lambda: DeepseekV2Config(**V3, topk_method="noaux_tc"), "topk_method is noaux_tc"),
    "biases": (lambda: DeepseekV2Config(**LATENT, mlp_bias=True), "mlp_bias is true, and shared experts are computed"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_feature_that_ours_lacks_is_named(name: str) -> None:
    make, message = UNKNOWN[name]
    with pytest.raises(ConfigError, match=message):
        read_hub_config(make())


@pytest.mark.parametrize("name", ["soft-cap", "dropout", "normalised"])
def test_a_model_with_such_a_feature_is_transformers_own(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, message = UNKNOWN[name]
    theirs = AutoModelForCausalLM.from_config(make()).eval()
    theirs.save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="alignlab.models.hub.checkpoints"):
        model = load_model(str(tmp_path), dtype=torch.float32)
    assert type(model) is type(theirs) and message in caplog.text
    torch.testing.assert_close(logits(model), logits(theirs))
