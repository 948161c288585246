"""The in-house decoder against `transformers`' own classes: logits, gradients, generation, float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
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
    PreTrainedModel,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from alignlab.models.hub.checkpoints import load_model, load_tokenizer
from alignlab.models.hub.families import read_hub_config
from alignlab.models.hub.packaged import resolve_checkpoint
from alignlab.models.transformer import PolicyForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
GEMMA: dict[str, Any] = {**SIZES, "head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 10}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 2000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
}
LATENT: dict[str, Any] = {
    **SIZES, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_routed_experts": 8,
    "first_k_dense_replace": 1,
}  # fmt: skip
GPT_OSS: dict[str, Any] = {
    **SIZES, "head_dim": 12, "sliding_window": 5, "num_local_experts": 4, "num_experts_per_tok": 2,
}
HYBRID_LAYERS = ["linear_attention", "full_attention", "linear_attention"]
LINEAR: dict[str, Any] = {
    **SIZES, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 6, "linear_conv_kernel_dim": 4, "layer_types": HYBRID_LAYERS,
}
PARTIAL_ROPE = {
    "rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    "mrope_interleaved": True,
}
KIMI: dict[str, Any] = {
    **SIZES, "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 12, "moe_intermediate_size": 16, "linear_num_heads": 4, "linear_head_dim": 8,
    "num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": HYBRID_LAYERS,
    "max_position_embeddings": 4096,
}  # fmt: skip
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0, 1.5, 2.0], "long_factor": [2.0, 4.0, 9.0],
    "partial_rotary_factor": 0.75,
}  # fmt: skip
GROUPS = {"n_group": 4, "topk_group": 2}
HUB: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama-multi-query-tied": lambda: LlamaConfig(**{**SIZES, "num_key_value_heads": 1}, tie_word_embeddings=True),
    "llama-multi-head-biases": lambda: LlamaConfig(
        **{**SIZES, "num_key_value_heads": 4}, attention_bias=True, mlp_bias=True, head_dim=12
    ),
    "llama-llama3-rope": lambda: LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-linear-rope": lambda: LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}
    ),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2-window": lambda: Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=3, max_window_layers=1),
    "qwen2-yarn": lambda: Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
    "qwen3-window": lambda: Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "mixtral-window": lambda: MixtralConfig(**SIZES, num_local_experts=4, sliding_window=5),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=12, norm_topk_prob=True),
    "qwen3-moe-mixed": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=False, mlp_only_layers=[1]),
    "llama-gelu": lambda: LlamaConfig(**SIZES, hidden_act="gelu"),
    "gemma2": lambda: Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=5.0),
    "gemma2-biases-no-caps": lambda: Gemma2Config(
        **GEMMA, attention_bias=True, attn_logit_softcapping=None, final_logit_softcapping=None,
        tie_word_embeddings=False, layer_types=["full_attention"] * 3,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **GEMMA, layer_types=["sliding_attention", "full_attention", "sliding_attention"], rope_parameters=GEMMA3_ROPE
    ),
    "gpt-oss": lambda: GptOssConfig(**GPT_OSS, rope_parameters={**YARN, "truncate": False}, swiglu_limit=1.5),
    "gpt-oss-one-kind-no-biases": lambda: GptOssConfig(
        **GPT_OSS, attention_bias=False, layer_types=["full_attention"] * 3, swiglu_limit=0.9, swiglu_alpha=0.7
    ),
    "olmo2": lambda: Olmo2Config(**SIZES),
    "olmo2-biases-yarn": lambda: Olmo2Config(**SIZES, attention_bias=True, rope_parameters=YARN),
    "deepseek-v3": lambda: DeepseekV3Config(**LATENT, **GROUPS, q_lora_rank=16),
    "deepseek-v3-plain-query-yarn": lambda: DeepseekV3Config(
        **LATENT, **GROUPS, q_lora_rank=None, rope_interleave=False, attention_bias=True, n_shared_experts=2,
        rms_norm_eps=1e-2, rope_parameters={**YARN, "mscale": 0.7, "mscale_all_dim": 1.3}, norm_topk_prob=False,
    ),
    "deepseek-v2": lambda: DeepseekV2Config(
        **LATENT, **GROUPS, q_lora_rank=None, topk_method="group_limited_greedy", routed_scaling_factor=1.5
    ),
    "deepseek-v2-greedy": lambda: DeepseekV2Config(**LATENT, q_lora_rank=16, rms_norm_eps=1e-2),
    "phi3": lambda: Phi3Config(**SIZES),
    "phi3-longrope": lambda: Phi3Config(
        **SIZES, max_position_embeddings=512, original_max_position_embeddings=64, rope_parameters=LONG_ROPE
    ),
    "qwen3-next": lambda: Qwen3NextConfig(**LINEAR, **EXPERTS, shared_expert_intermediate_size=24),
    "qwen3-next-mixed": lambda: Qwen3NextConfig(
        **LINEAR, **EXPERTS, shared_expert_intermediate_size=16, norm_topk_prob=False, mlp_only_layers=[1],
        attention_bias=True,
    ),
    "qwen3.5": lambda: Qwen3_5TextConfig(**LINEAR, rope_parameters=PARTIAL_ROPE),
    "qwen3.5-tied": lambda: Qwen3_5TextConfig(**LINEAR, tie_word_embeddings=True),
    "kimi-linear": lambda: KimiLinearConfig(**KIMI, n_group=1, topk_group=1),
    "kimi-linear-groups": lambda: KimiLinearConfig(
        **KIMI, n_group=4, topk_group=2, rms_norm_eps=1e-3, n_shared_experts=2, moe_renormalize=False
    ),
    "phi3-window-partial-rotation": lambda: Phi3Config(
        **SIZES, sliding_window=5, rope_parameters={
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        },
    ),
}


def randomize(model: torch.nn.Module) -> None:
    """Give norms, biases and the routers' balancing biases other values than they start with."""
    biases = [(name, buffer) for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")]
    for name, tensor in [*model.named_parameters(), *biases]:
        if tensor.ndim == 1:
            torch.nn.init.normal_(tensor, mean=1.0 if "norm" in name else 0.0, std=0.3)


def pair(name: str, attention: str = "alignlab") -> tuple[PreTrainedModel, PolicyForCausalLM]:
    """A random Hub model, norms and biases included, and ours with the same weights."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(HUB[name](), attn_implementation="eager").eval()
    randomize(theirs)
    config = read_hub_config(theirs.config)
    assert config is not None
    config._attn_implementation = attention
    ours = PolicyForCausalLM(config).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(key.endswith("expert_load") for key in missing)
    return theirs, ours


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


CASES = [(name, attention) for name in HUB for attention in ("alignlab", "eager", "sdpa")]


NOT_IN_SDPA = ("gemma2", "gpt-oss", "gpt-oss-one-kind-no-biases")
"""With soft-caps or sinks."""


@pytest.mark.parametrize(
    ("name", "attention"), [case for case in CASES if case not in [(name, "sdpa") for name in NOT_IN_SDPA]]
)
def test_logits(name: str, attention: str) -> None:
    theirs, ours = pair(name, attention)
    tokens = torch.randint(3, 61, (2, 40))
    with torch.no_grad():
        assert relative(ours(tokens).logits, theirs(tokens).logits) <= 1e-5


@pytest.mark.parametrize("name", HUB)
def test_gradients(name: str) -> None:
    theirs, ours = pair(name)
    tokens = torch.randint(3, 61, (2, 24))
    losses = [model(tokens, labels=tokens).loss for model in (ours, theirs)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    known = dict(theirs.named_parameters())
    assert set(dict(ours.named_parameters())) == set(known)
    for key, parameter in ours.named_parameters():
        assert parameter.grad is not None and relative(parameter.grad, known[key].grad) <= 1e-4, key


@pytest.mark.parametrize(
    "name", ["llama", "qwen2-window", "qwen3-moe", "gemma2", "gemma3", "olmo2", "deepseek-v3", "phi3"]
)
def test_padded_batch(name: str) -> None:
    theirs, ours = pair(name)
    tokens, mask = torch.randint(3, 61, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[0, :5], mask[1, :2] = 0, 0
    with torch.no_grad():
        logits = [model(tokens, attention_mask=mask).logits[mask.bool()] for model in (ours, theirs)]
    assert relative(*logits) <= 1e-5


@pytest.mark.parametrize(
    "name", ["llama", "qwen2-window", "qwen3", "mixtral", "gemma2", "gemma3", "olmo2", "deepseek-v2", "phi3"]
)
def test_greedy_generation_of_a_padded_batch(name: str) -> None:
    theirs, ours = pair(name)
    tokens, mask = torch.randint(3, 61, (3, 9)), torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = 0
    options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(ours.generate(tokens, **options), theirs.generate(tokens, **options))


@pytest.fixture(scope="module")
def smollm2() -> tuple[PreTrainedModel, PreTrainedModel, Tensor]:
    """SmolLM2-135M-Instruct, ours and theirs in float32, and a chat prompt."""
    name = "smollm2-135m-instruct"
    theirs = AutoModelForCausalLM.from_pretrained(resolve_checkpoint(name), dtype=torch.float32)
    messages = [{"role": "user", "content": "What is 7 + 5? Reply with only the final answer."}]
    prompt = load_tokenizer(name).apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    return load_model(name, dtype=torch.float32), theirs.eval(), prompt["input_ids"]


def test_smollm2_logits_gradients_and_generation(
    smollm2: tuple[PreTrainedModel, PreTrainedModel, Tensor],
) -> None:
    ours, theirs, prompt = smollm2
    assert isinstance(ours, PolicyForCausalLM)
    logits = [model(prompt).logits for model in (ours, theirs)]
    assert relative(*logits) <= 1e-4
    for each in logits:
        each.log_softmax(-1)[..., 7].sum().backward()
    # transformers keeps the padding token's embedding from learning; here that is the end token too.
    ours.model.embed_tokens.weight.grad[2], theirs.model.embed_tokens.weight.grad[2] = 0, 0
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert relative(one.grad, other.grad) <= 1e-3
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))
