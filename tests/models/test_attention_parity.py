"""Kinds of attention against the classes of `transformers` that have them, in float64: outputs and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DeepseekV3Config, GptOssConfig, GptOssForCausalLM, KimiLinearConfig, Qwen3NextConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearAttention
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

from alignlab.models.attention_kinds import make_attention
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import hidden_states
from alignlab.models.rope import RotaryEmbedding
from tests.models.attention_kinds import LATENT, PARTIAL, SHAPE
from tests.models.conftest import make_segments, sequences_of
from tests.reference.float64 import really_float64

LENGTH = 11
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 0.7,
    "mscale_all_dim": 1.3,
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 50}


def assert_same(ours: Any, theirs: Any, our_arguments: tuple[Any, ...], their_arguments: tuple[Any, ...]) -> None:
    """Compare two modules of the same weights on the same hidden states: outputs, gradients of input and weights."""
    for (name, parameter), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.4)
        other.data.copy_(parameter.data - (1.0 if name in ONE_PLUS and isinstance(theirs, Qwen3NextAttention) else 0.0))
    mask = torch.full((LENGTH, LENGTH), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    weights = torch.randn(2, LENGTH, 32, dtype=torch.float64)
    results = []
    for module, arguments in ((ours, our_arguments), (theirs, their_arguments)):
        x = torch.randn(2, LENGTH, 32, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        output = module(x, *arguments, attention_mask=mask)[0]
        grads = torch.autograd.grad((output * weights).sum(), [x, *module.parameters()])
        results.append([output.detach(), *grads])
    for mine, exact in zip(*results, strict=True):
        assert (mine - exact).abs().max() <= 1e-12 * max(1, float(exact.abs().max()))


ONE_PLUS = ("q_norm.weight", "k_norm.weight")  # Qwen3-Next multiplies by 1 + weight


def rotation_of(layer: Any) -> tuple[Tensor, Tensor]:
    rotary = RotaryEmbedding(layer.config, layer.rotary_size)
    return rotary(torch.arange(LENGTH)[None], torch.float64)


def make_layer(**fields: Any) -> Any:
    config = PolicyConfig(**{**SHAPE, "num_hidden_layers": 1, **fields})
    config._attn_implementation = "eager"
    return make_attention(config, 0).double().eval()


@pytest.mark.parametrize("rope", [None, YARN], ids=["default", "yarn"])
@pytest.mark.parametrize("rank", [None, 16])
@pytest.mark.parametrize("interleave", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_latent_attention_is_that_of_deepseek_v3(rope: Any, rank: int | None, interleave: bool, bias: bool) -> None:
    torch.manual_seed(0)
    fields = {**LATENT, "q_lora_rank": rank, "rope_interleave": interleave, "attention_bias": bias}
    with really_float64():
        ours = make_layer(**fields, layer_types=["latent_attention"], rope_parameters=rope)
        hub = DeepseekV3Config(**SIZES, **fields, num_key_value_heads=4, rope_parameters=rope)
        hub._attn_implementation = "eager"
        theirs = DeepseekV3Attention(hub, 0).double().eval()
        rotary = DeepseekV3RotaryEmbedding(hub)(torch.zeros(1, dtype=torch.float64), torch.arange(LENGTH)[None])
        assert_same(ours, theirs, (rotation_of(ours),), (rotary,))


def test_latent_attention_without_rotation_is_that_of_kimi_linear() -> None:
    torch.manual_seed(0)
    with really_float64():
        ours = make_layer(**LATENT, layer_types=["latent_attention"], no_rope_layers=[0])
        hub = KimiLinearConfig(**SIZES, **LATENT, num_key_value_heads=4, layer_types=["full_attention"])
        hub._attn_implementation = "eager"
        assert_same(ours, KimiLinearAttention(hub, 0).double().eval(), (None,), ())


def test_gated_attention_with_partial_rotation_is_that_of_qwen3_next() -> None:
    torch.manual_seed(0)
    with really_float64():
        ours = make_layer(layer_types=["gated_attention"], rope_parameters=PARTIAL, use_qk_norm=True)
        hub = Qwen3NextConfig(
            **SIZES, num_key_value_heads=2, head_dim=8, rope_parameters=PARTIAL, layer_types=["full_attention"]
        )
        hub._attn_implementation = "eager"
        theirs = Qwen3NextAttention(hub, 0).double().eval()
        rotary = Qwen3NextRotaryEmbedding(hub)(torch.zeros(1, dtype=torch.float64), torch.arange(LENGTH)[None])
        assert_same(ours, theirs, (rotation_of(ours),), (rotary,))


def test_packed_sinks_and_windows_are_those_of_gpt_oss() -> None:
    """`transformers`' own model, packed with shared prompts through our attention, and each sequence alone by its own.
    """
    torch.manual_seed(0)
    config = GptOssConfig(
        **{**SIZES, "num_hidden_layers": 2}, num_key_value_heads=2, head_dim=8, intermediate_size=32, pad_token_id=0,
        num_local_experts=4, num_experts_per_tok=2, sliding_window=4, initializer_range=0.3,
        experts_implementation="eager", attn_implementation="eager",
    )
    model = GptOssForCausalLM(config).double().eval()
    segments = make_segments([(5, [3, 1, 6]), (7, []), (2, [4, 4])])
    tokens = torch.randint(1, 50, (segments.num_tokens,))
    weights = torch.randn(segments.num_tokens, 32, dtype=torch.float64)
    own = segments.sequence_of_token >= 0
    with really_float64():
        alone = torch.zeros((), dtype=torch.float64)
        states = torch.zeros_like(weights)
        for index in sequences_of(segments):
            output = model.model(tokens[index][None]).last_hidden_state[0]
            alone = alone + (output * weights[index])[own[index]].sum()
            states[index] = output.detach()
        expected = torch.autograd.grad(alone, list(model.parameters()), allow_unused=True)
        model.set_attn_implementation("alignlab")
        packed = hidden_states(model, tokens, segments.position_ids, segments)
        grads = torch.autograd.grad((packed * weights)[own].sum(), list(model.parameters()), allow_unused=True)
    assert (packed - states)[own].abs().max() <= 1e-12 * states.abs().max()
    for ours, theirs in zip(grads, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours - theirs).abs().max() <= 1e-11 * max(1, float(theirs.abs().max()))
