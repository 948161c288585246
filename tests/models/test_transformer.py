"""The decoder and its parts: identities, precision, and configs that are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import hidden_states
from alignlab.models.layers import RMSNorm
from alignlab.models.rope import RotaryEmbedding, rope_frequencies, rotate
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.types import Segments

SHAPE: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3,
}
EVERYTHING: dict[str, Any] = {
    "head_dim": 8, "use_qk_norm": True, "attention_bias": True, "tie_word_embeddings": True, "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"], "attn_logit_softcapping": 5.0,
    "final_logit_softcapping": 3.0, "mlp_layer_types": ["dense", "sparse", "dense"], "num_experts": 4,
    "moe_intermediate_size": 8, "n_shared_experts": 1, "scoring_func": "sigmoid", "router_bias_update_rate": 0.01,
}


def model(attention: str = "alignlab", **changes: Any) -> PolicyForCausalLM:
    torch.manual_seed(0)
    config = PolicyConfig(**{**SHAPE, **changes})
    config._attn_implementation = attention
    return PolicyForCausalLM(config).eval()


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
def test_flat_packed_tokens_equal_the_sequences_one_by_one(changes: dict[str, Any]) -> None:
    policy = model(**changes)
    segments = Segments((5, 3, 4, 7), (-1, 0, 0, -1), (-1, 0, 1, 2), (0, 0, 0, 1))
    tokens = torch.randint(0, 50, (19,))
    packed = hidden_states(policy, tokens, segments.position_ids, segments)
    prompt, first, second, alone = tokens.split([5, 3, 4, 7])
    whole = [torch.cat((prompt, first)), torch.cat((prompt, second)), alone]
    one, other, last = (policy.model(x[None]).last_hidden_state[0] for x in whole)
    torch.testing.assert_close(packed, torch.cat((one, other[5:], last)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("attention", ["alignlab", "eager"])
def test_decoding_from_a_cache_equals_the_full_forward(changes: dict[str, Any], attention: str) -> None:
    policy, tokens = model(attention, **changes), torch.randint(0, 50, (2, 11))
    with torch.no_grad():
        full = policy(tokens).logits
        step = policy(tokens[:, :4], use_cache=True)
        pieces = [step.logits]
        for index in range(4, 11):
            step = policy(tokens[:, index : index + 1], past_key_values=step.past_key_values)
            pieces.append(step.logits)
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-4, atol=1e-5)


def test_attention_implementations_agree_with_every_option_on() -> None:
    tokens = torch.randint(0, 50, (2, 9))
    one, other = (model(name, **EVERYTHING)(tokens).logits for name in ("alignlab", "eager"))
    torch.testing.assert_close(one, other)
    assert one.abs().max() < 3.0, "the final cap bounds the logits"


def test_sdpa_is_refused_with_a_soft_cap() -> None:
    with pytest.raises(ConfigError, match="sdpa"):
        model("sdpa", attn_logit_softcapping=5.0)(torch.randint(0, 50, (1, 4)))


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tokens, found = torch.randint(0, 50, (1, 12)), []
    for checkpointing in (False, True):
        policy = model().train()
        if checkpointing:
            policy.gradient_checkpointing_enable()
        policy(tokens, labels=tokens).loss.backward()
        found.append([parameter.grad for parameter in policy.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_model_has_the_interface_of_transformers() -> None:
    policy, tokens = model("eager"), torch.randint(0, 50, (2, 7))
    output = policy(tokens, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    torch.testing.assert_close(policy.lm_head(output.hidden_states[-1]), output.logits)
    torch.testing.assert_close(output.attentions[1].sum(-1), torch.ones(2, 4, 7))
    assert torch.equal(policy.model(tokens, return_dict=False)[0], output.hidden_states[-1])
    assert torch.equal(policy(tokens, logits_to_keep=2).logits, output.logits[:, -2:])
    embeddings = policy.get_input_embeddings()(tokens)
    torch.testing.assert_close(policy(inputs_embeds=embeddings).logits, output.logits)
    with pytest.raises(ValueError, match="exactly one"):
        policy.model()


def test_a_window_hides_what_lies_before_it() -> None:
    policy = model(num_hidden_layers=1, layer_types=["sliding_attention"], sliding_window=3)
    tokens = torch.randint(0, 50, (1, 8))
    changed = tokens.clone()
    changed[0, 2] = (changed[0, 2] + 1) % 50
    difference = (policy(tokens).logits - policy(changed).logits).abs().amax(-1)[0]
    assert (difference[2:5] > 1e-4).all() and (difference[5:] == 0).all() and (difference[:2] == 0).all()


def test_the_norm_against_its_definition_and_finite_differences() -> None:
    norm = RMSNorm(6, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 3, 6, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected)
    norm.double()
    assert torch.autograd.gradcheck(lambda x, weight: norm(x), (x.detach().double().requires_grad_(), norm.weight))


def test_the_norm_rounds_once_in_bfloat16() -> None:
    norm = RMSNorm(64, eps=1e-5)
    torch.nn.init.normal_(norm.weight, mean=1.0, std=0.3)
    norm.bfloat16()
    x = torch.randn(50, 64).bfloat16()
    wide = x.float()
    expected = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight.float()
    trained = norm(x)
    with torch.no_grad():
        decoded = norm(x)
    for output in (trained, decoded):
        torch.testing.assert_close(output.float(), expected.bfloat16().float(), rtol=0.008, atol=0)
    assert (trained != decoded).float().mean() < 0.01


def test_rotation_turns_pairs_by_their_angle_and_keeps_relative_positions() -> None:
    config = PolicyConfig(**SHAPE, head_dim=8)
    rope = RotaryEmbedding(config, 8)
    heads = torch.randn(1, 6, 2, 8)
    turned = rotate(heads, rope(torch.arange(6)[None], torch.float32))
    angle = 5 * rope_frequencies(config, 8)[0][1]
    first, second = heads[0, 5, 0, 1], heads[0, 5, 0, 5]
    torch.testing.assert_close(turned[0, 5, 0, 1], first * angle.cos() - second * angle.sin())
    torch.testing.assert_close(turned[0, 5, 0, 5], second * angle.cos() + first * angle.sin())
    moved = rotate(heads, rope(torch.arange(100, 106)[None], torch.float32))
    scores = [torch.einsum("bqhd,bkhd->bhqk", x, x) for x in (turned, moved)]
    torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-4)


def test_rotary_frequencies_stay_float32_in_a_bfloat16_model() -> None:
    policy = model()
    before = policy.model.rotary_embs["6"].inv_freq.clone()
    after = policy.bfloat16().model.rotary_embs["6"].inv_freq
    assert after.dtype == torch.float32 and torch.equal(after, before)
    assert not any("inv_freq" in name for name in policy.state_dict())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 26}, "give head_dim"),
        ({"head_dim": 7}, "must be even"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "is linear, and factor must be given in"),
        (
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}},
            "low_freq_factor and high_freq_factor must be given in rope_parameters",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": "4"}},
            "factor is '4' in rope_parameters, and must be a positive number",
        ),
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, "short_factor": [1.0]}},
            "is longrope, and long_factor must be given in rope_parameters",
        ),
        ({"hidden_act": "relu2"}, "hidden_act is 'relu2', and must be silu or gelu"),
        ({"attn_logit_softcapping": -1.0}, "attn_logit_softcapping"),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries"),
        ({"layer_types": ["full_attention", "linear", "full_attention"]}, "linear"),
        ({"sliding_window": 8}, "leave it out"),
        ({"layer_types": ["sliding_attention"] * 3}, "give it"),
        ({"num_experts": 4, "moe_intermediate_size": 8, "mlp_layer_types": ["dense"] * 3}, "no layer is sparse"),
        ({"mlp_layer_types": ["sparse"] * 3}, "num_experts is 0"),
        ({"num_experts": 4}, "moe_intermediate_size"),
        ({"num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"num_experts": 4, "moe_intermediate_size": 12}, "multiple of 8"),
        ({"num_experts": 4, "moe_intermediate_size": 8, "scoring_func": "relu"}, "softmax or sigmoid"),
        ({"num_experts": 4, "moe_intermediate_size": 8, "router_z_loss_coef": -0.1}, "router_z_loss_coef"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_combinations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**{**SHAPE, **changes})
