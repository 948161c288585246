"""Norms, feed-forwards and their places in a layer, by hand and by their definitions; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.layers import (
    ACTIVATIONS,
    FeedForward,
    FusedFeedForward,
    PlainFeedForward,
    ZeroCenteredRMSNorm,
    make_feed_forward,
    make_norm,
)
from alignlab.models.rope import rope_frequencies
from alignlab.models.transformer import PolicyForCausalLM, rounded_multiplier
from tests.models.attention_kinds import LATENT, SHAPE, make_model


def test_a_zero_centered_norm_multiplies_by_one_plus_its_weight() -> None:
    norm = ZeroCenteredRMSNorm(2, eps=0.0)
    assert norm.weight.tolist() == [0.0, 0.0]
    norm.weight.data.copy_(torch.tensor([1.0, -0.5]))
    x = torch.tensor([[3.0, 4.0]])  # the root of the mean of squares is 5 / sqrt(2)
    expected = torch.tensor([[6.0, 2.0]]) * 2**0.5 / 5
    torch.testing.assert_close(norm(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), expected)


def test_a_zero_centered_norm_has_the_gradients_of_its_definition() -> None:
    norm = ZeroCenteredRMSNorm(6, eps=1e-3).double()
    nn.init.normal_(norm.weight)
    x = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)

    def definition(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.pow(2).mean(-1, keepdim=True) + 1e-3).rsqrt() * (1 + weight)

    outputs = [norm(x), definition(x, norm.weight)]
    ours, exact = (torch.autograd.grad(output.sin().sum(), [x, norm.weight]) for output in outputs)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("has_grad", [True, False])
def test_one_plus_a_small_weight_is_not_rounded_to_bfloat16(has_grad: bool) -> None:
    """1 + 2^-10 is 1 in bfloat16; over many numbers the product shows it."""
    norm = ZeroCenteredRMSNorm(4096, eps=0.0).bfloat16()
    nn.init.constant_(norm.weight, 2**-10)
    x = torch.randn(3, 4096).bfloat16()
    with torch.set_grad_enabled(has_grad):
        outputs = norm(x)
    exact = F.rms_norm(x.double(), (4096,), eps=0.0) * (1 + 2**-10)
    assert outputs.dtype == torch.bfloat16
    torch.testing.assert_close(outputs, exact.bfloat16(), rtol=0, atol=0)


def test_feed_forwards_are_what_their_names_say() -> None:
    x = torch.randn(3, 4)
    for name, function in (
        ("silu", lambda t: t * t.sigmoid()), ("relu", lambda t: t.clamp(min=0)),
        ("gelu", lambda t: t * 0.5 * (1 + torch.erf(t / 2**0.5))),
        ("gelu_pytorch_tanh", lambda t: t * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3)))),
    ):
        torch.testing.assert_close(ACTIVATIONS[name](x), function(x))
        gated, plain = (kind(4, 6, activation=name, bias=True) for kind in (FeedForward, PlainFeedForward))
        torch.testing.assert_close(gated(x), gated.down_proj(function(gated.gate_proj(x)) * gated.up_proj(x)))
        torch.testing.assert_close(plain(x), plain.down_proj(function(plain.up_proj(x))))
        fused = FusedFeedForward(4, 6, activation=name, bias=True)
        fused.down_proj = gated.down_proj
        for part in ("weight", "bias"):
            parts = [getattr(layer, part) for layer in (gated.gate_proj, gated.up_proj)]
            getattr(fused.gate_up_proj, part).data.copy_(torch.cat(parts))
        torch.testing.assert_close(fused(x), gated(x))


def layer_of(**fields: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The first layer of a random model, its attention as a function, and the arguments of both."""
    model: Any = make_model("gated", **{"layer_types": ["full_attention"] * 2, **fields})
    layer = model.model.layers[0]
    rotations = {key: rotary(torch.arange(7)[None], torch.float32) for key, rotary in model.model.rotary_embs.items()}
    mask = torch.full((7, 7), -torch.inf).triu(1)[None, None]
    model.set_attn_implementation("eager")
    attend = lambda x: layer.self_attn(x, rotations[layer.self_attn.rotation_key], attention_mask=mask)[0]  # noqa: E731
    return layer, attend, {"rotations": rotations, "attention_mask": mask}


def norms(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_children() if "norm" in name}


def test_norms_stand_where_norm_position_says() -> None:
    x = torch.randn(1, 7, 32)
    layer, attend, arguments = layer_of(norm_position="pre")
    assert norms(layer) == {"input_layernorm", "post_attention_layernorm"}
    middle = x + attend(layer.input_layernorm(x))
    torch.testing.assert_close(layer(x, **arguments), middle + layer.mlp(layer.post_attention_layernorm(middle)))

    layer, attend, arguments = layer_of(norm_position="post")
    assert norms(layer) == {"post_attention_layernorm", "post_feedforward_layernorm"}
    middle = x + layer.post_attention_layernorm(attend(x))
    torch.testing.assert_close(layer(x, **arguments), middle + layer.post_feedforward_layernorm(layer.mlp(middle)))

    layer, attend, arguments = layer_of(norm_position="sandwich")
    assert len(norms(layer)) == 4
    middle = x + layer.post_attention_layernorm(attend(layer.input_layernorm(x)))
    fed = layer.mlp(layer.pre_feedforward_layernorm(middle))
    torch.testing.assert_close(layer(x, **arguments), middle + layer.post_feedforward_layernorm(fed))


def test_parallel_attention_and_feed_forward_read_one_norm() -> None:
    x = torch.randn(1, 7, 32)
    layer, attend, arguments = layer_of(parallel_attn=True)
    assert norms(layer) == {"input_layernorm"}
    normed = layer.input_layernorm(x)
    torch.testing.assert_close(layer(x, **arguments), x + attend(normed) + layer.mlp(normed))


def test_queries_are_normed_over_all_heads_together() -> None:
    """With queries of one size in each head but another between heads, norms head by head would forget the latter."""
    layer: Any = make_model("norms-of-outputs").model.layers[0].self_attn
    assert layer.q_norm.weight.shape == (32,) and layer.k_norm.weight.shape == (16,)
    seen = []
    layer.q_norm.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    layer(torch.randn(1, 1, 32), (torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 1, 8)))
    ((flat, normed),) = seen
    expected = flat * (flat.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * layer.q_norm.weight
    torch.testing.assert_close(normed, expected)


def test_scores_are_divided_by_the_root_of_query_pre_attn_scalar() -> None:
    assert make_model("sandwich").model.layers[0].self_attn.scaling == 6**-0.5
    assert make_model("gated").model.layers[0].self_attn.scaling == 8**-0.5
    assert make_model("latent-between-norms").model.layers[0].self_attn.scaling == 5.5**-0.5


def test_layers_with_a_window_have_a_rotation_of_their_own() -> None:
    model: Any = make_model("sandwich", rope_parameters={"rope_type": "linear", "rope_theta": 16.0, "factor": 2.0})
    assert [layer.self_attn.rotation_key for layer in model.model.layers] == ["8_local", "8"]
    local, other = (model.model.rotary_embs[key].inv_freq for key in ("8_local", "8"))
    torch.testing.assert_close(local, torch.tensor([50.0 ** (-i / 4) for i in range(4)]))
    torch.testing.assert_close(other, torch.tensor([16.0 ** (-i / 4) / 2 for i in range(4)]))
    assert torch.equal(model.bfloat16().model.rotary_embs["8_local"].inv_freq, local)
    assert torch.equal(rope_frequencies(model.config, 8, local=True)[0], local)
    assert make_model("gated-window").model.layers[0].self_attn.rotation_key == "8"


def test_the_multiplier_of_embeddings_is_rounded_to_their_dtype() -> None:
    assert rounded_multiplier(3072**0.5, torch.bfloat16) == 55.5
    assert rounded_multiplier(3072**0.5, torch.float32) == pytest.approx(3072**0.5, rel=1e-7)
    model = make_model("gated", embedding_multiplier=3072**0.5).bfloat16()
    ids = torch.tensor([[3, 4]])
    scaled = model.model.embed_tokens(ids) * 55.5
    assert torch.equal(model(ids).logits, model(inputs_embeds=scaled).logits)


def test_latents_may_have_an_epsilon_of_their_own() -> None:
    layer: Any = make_model("latent", latent_norm_eps=0.5).model.layers[0]
    assert (layer.self_attn.q_a_layernorm.eps, layer.self_attn.kv_a_layernorm.eps) == (0.5, 0.5)
    assert layer.input_layernorm.eps == 1e-6


def test_a_new_model_starts_with_norms_that_only_normalise() -> None:
    for kind in ("zero_centered_rmsnorm", "rmsnorm", "layernorm"):
        config = PolicyConfig(**SHAPE, norm_type=kind, vocab_size=20)
        model = PolicyForCausalLM(config)
        norm, x = make_norm(config, 32), torch.randn(3, 32)
        for name, module in model.named_modules():
            if name.endswith("norm"):
                torch.testing.assert_close(module(x), norm(x))
    assert isinstance(make_feed_forward(PolicyConfig(**SHAPE)), FeedForward)


EXPERTS: dict[str, Any] = {"num_experts": 4, "moe_intermediate_size": 8}


def test_experts_have_the_config_s_activation() -> None:
    model: Any = make_model("gated", **EXPERTS, num_experts_per_tok=4, hidden_act="relu", n_shared_experts=1)
    block, x = model.model.layers[0].mlp, torch.randn(5, 32)
    gates = block.gate(x, None).logits.softmax(-1)
    shared = block.shared_experts
    expected = shared.down_proj(shared.gate_proj(x).relu() * shared.up_proj(x))
    for expert in range(4):
        gate, up = (x @ block.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        expected = expected + gates[:, expert, None] * ((gate.relu() * up) @ block.experts.down_proj[expert].T)
    torch.testing.assert_close(block(x), expected)


def test_a_router_in_float32_is_not_rounded_to_bfloat16() -> None:
    x = torch.randn(5, 32).bfloat16()
    for exact in (True, False):
        model: Any = make_model("gated", **EXPERTS, router_in_fp32=exact).bfloat16()
        router = model.model.layers[0].mlp.gate
        logits = router(x, None).logits
        expected = x.float() @ router.weight.float().T
        assert logits.dtype == torch.float32
        assert ((logits - expected).abs().max() < 1e-5) == exact


def test_a_balancing_bias_may_stay_as_it_is() -> None:
    router: Any = make_model("gated", **EXPERTS, router_bias=True).model.layers[0].mlp.gate
    router.e_score_correction_bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    router.move_bias(torch.tensor([9, 0, 0, 0]))
    assert router.e_score_correction_bias.tolist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_type": "batchnorm"}, "norm_type is 'batchnorm', and must be rmsnorm or zero_centered_rmsnorm or"),
        ({"norm_position": "middle"}, "norm_position is 'middle', and must be pre or post or sandwich"),
        ({"hidden_act": "quick"}, "hidden_act is 'quick', and must be silu or gelu or gelu_pytorch_tanh or relu"),
        ({"qk_norm_scope": "layer", "use_qk_norm": True}, "qk_norm_scope is 'layer', and must be head or all_heads"),
        ({"qk_norm_scope": "all_heads"}, "qk_norm_scope is all_heads, and use_qk_norm is false; set it to true"),
        ({"embedding_multiplier": 0.0}, "embedding_multiplier is 0.0, and must be a positive number"),
        ({"query_pre_attn_scalar": -1}, "query_pre_attn_scalar is -1, and must be a positive number"),
        ({"query_pre_attn_scalar": float("inf")}, "query_pre_attn_scalar is inf, and must be a positive number"),
        ({"parallel_attn": True, "norm_position": "post"}, "parallel_attn is true with norm_position post, .* use"),
        ({"mlp_gated": False, **EXPERTS}, "mlp_gated is false, and must be true where a layer is sparse"),
        ({"fused_projections": True, **EXPERTS}, "fused_projections is true, and must be false where a layer is sp"),
        ({"fused_projections": True, "mlp_gated": False}, "fused_projections is true, .* leave one of the two out"),
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq is 10000.0, and must be positive, and given only where"),
        (
            {"rope_local_base_freq": 0.0, "layer_types": ["sliding_attention"] * 2, "sliding_window": 3},
            "rope_local_base_freq is 0.0, and must be positive",
        ),
        (
            {"layer_types": ["gated_attention"] * 2, "use_qk_norm": True, "qk_norm_scope": "all_heads"},
            "qk_norm_scope is all_heads, and must be head where a layer is gated_attention",
        ),
        (
            {"layer_types": ["gated_attention"] * 2, "fused_projections": True},
            "fused_projections is true, and must be false where a layer is gated_attention",
        ),
        (
            {"layer_types": ["latent_attention"] * 2, **LATENT, "fused_projections": True},
            "fused_projections is true, and must be false where a layer is latent_attention",
        ),
        ({"latent_norm_eps": 1e-5}, "latent_norm_eps is 1e-05, but no layer is latent_attention"),
        (
            {**EXPERTS, "router_bias": True, "router_type": "hash"},
            "router_bias is true, and router_type hash has no bias; leave it out",
        ),
    ],
)  # fmt: skip
def test_impossible_blocks_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**{**SHAPE, **fields})
