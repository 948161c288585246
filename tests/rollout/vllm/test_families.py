"""Hub families whose layers vLLM computes in its own classes alone: which run where, and what is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, PreTrainedConfig, Qwen3NextConfig

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import VLLMSettings
from alignlab.errors import ConfigError
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import save_model
from alignlab.models.hub.families import read_hub_config
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.vllm.options import check_model, checked_adapter_rank, engine_options, sync_adapter_only
from alignlab.types import SamplingParams
from tests.models.test_parity import HUB, LATENT
from tests.rollout.conftest import VOCAB, make_prompts

HYBRID: dict[str, Any] = {  # sizes that vLLM's kernels for a CPU take
    "vocab_size": VOCAB, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "num_key_value_heads": 1,
    "head_dim": 128, "linear_num_key_heads": 1, "linear_num_value_heads": 1, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "layer_types": ["linear_attention", "full_attention"],
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    "max_position_embeddings": 128, "initializer_range": 0.1,
}  # fmt: skip


def policy(hub: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PolicyForCausalLM:
    torch.manual_seed(0)
    config = read_hub_config(hub)
    assert config is not None
    return PolicyForCausalLM(config).to(dtype)


@pytest.mark.vllm
def test_updates_of_gated_deltanet_and_gated_attention_are_verified(make_vllm: Callable[..., Any]) -> None:
    model = policy(Qwen3NextConfig(**HYBRID), torch.bfloat16)
    engine = make_vllm(model)
    for version in (1, 2):
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
        engine.update_weights(version)
        assert engine.last_sync.gap.mean < 0.05
    [rollout] = engine.generate(make_prompts(9), SamplingParams(n=2, max_new_tokens=8, ignore_eos=True, seed=1))
    assert all(len(completion.token_ids) == 8 for completion in rollout.completions)


@pytest.mark.vllm
def test_vllm_reads_the_layers_of_kimi_linear_from_our_checkpoint(tmp_path: Path) -> None:
    from vllm.transformers_utils.configs.kimi_linear import KimiLinearConfig

    model = policy(HUB["kimi-linear"]())
    save_model(model, tmp_path)
    theirs = KimiLinearConfig.from_pretrained(tmp_path)
    assert [theirs.is_kda_layer(index) for index in range(3)] == [True, False, True]
    assert theirs.is_mla and theirs.mla_use_nope and theirs.is_linear_attn
    assert (theirs.num_experts, theirs.num_experts_per_token, theirs.num_shared_experts) == (8, 2, 1)
    assert (theirs.num_expert_group, theirs.topk_group, theirs.moe_renormalize) == (1, 1, True)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v2", "qwen3-next", "qwen3.5", "kimi-linear"])
def test_a_family_passes_where_vllm_may_run_on_a_gpu(name: str) -> None:
    check_model(policy(HUB[name]()), VLLMSettings())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("deepseek-v3", "family deepseek_v3, and vLLM 0.32 on a CPU computes latent attention wrongly"),
        ("deepseek-v2", "family deepseek_v2, and vLLM 0.32 on a CPU computes latent attention wrongly"),
        ("kimi-linear", "family kimi_linear, and vLLM 0.32 on a CPU needs Triton"),
        ("qwen3.5", "family qwen3_5_text, and vLLM 0.32 on a CPU wants torchvision"),
        ("qwen3-next", r"qwen3_next in float32, and .* bfloat16 alone; use model\.dtype: bfloat16"),
    ],
)
def test_what_fails_on_a_cpu_is_refused_before_vllm_starts(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*embedded"):
        check_model(policy(HUB[name]()), VLLMSettings(), on_cpu=True)


def test_another_rotation_of_latents_is_refused() -> None:
    hub = DeepseekV3Config(**LATENT, q_lora_rank=16, n_group=1, topk_group=1, rope_interleave=False)
    with pytest.raises(ConfigError, match="rope_interleave is false, and vLLM"):
        check_model(policy(hub), VLLMSettings())


def test_prefixes_of_states_are_not_cached_on_a_cpu() -> None:
    """vLLM asks for prompts in chunks then, which a CPU's random numbers do not bear."""
    for name, is_cached in (("qwen3-next", False), ("llama", True)):
        model = policy(HUB[name](), torch.bfloat16)
        options = engine_options(VLLMSettings(), model, adapter_rank=0, on_cpu=True)
        assert options["enable_prefix_caching"] == is_cached


@pytest.mark.parametrize("name", ["deepseek-v3", "qwen3-next"])
def test_their_adapters_are_merged(name: str) -> None:
    model = add_lora(policy(HUB[name]()), LoraSettings(rank=2))
    assert not sync_adapter_only(VLLMSettings(), model, on_cpu=False)
    with pytest.raises(ConfigError, match="adapter is of a model with latent attention or recurrent layers"):
        checked_adapter_rank(model)
