"""Every kind of attention: packed against unshared padded batches, decoding with `generate`, sizes, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GenerationConfig

from alignlab.config.model import LoraSettings
from alignlab.errors import ConfigError
from alignlab.models.adapters import add_lora
from alignlab.models.attention_kinds import ATTENTION_KINDS
from alignlab.models.cache_spec import LayerCacheSpec, cache_specs
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import hidden_states
from alignlab.models.flex_attention import flex_packed_attention
from alignlab.models.hub.families import write_hub_config
from alignlab.models.packed_attention import packed_attention
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.types import Segments
from tests.models.attention_kinds import KINDS, LATENT, PARTIAL, SHAPE, make_model
from tests.models.conftest import make_segments, packs
from tests.models.kinds_table import RECURRENT_ROWS, ROWS, recurrent_rows, rows
from tests.reference.attention import dense_attention
from tests.reference.float64 import grouped_in_float64, really_float64


@pytest.fixture(autouse=True, scope="module")
def any_dtype() -> Iterator[None]:
    """Experts are computed in float64 too."""
    with grouped_in_float64():
        yield


def padded_and_packed(policy: PolicyForCausalLM, segments: Segments, tokens: Tensor) -> list[list[Tensor]]:
    """Hidden states of completions and gradients, from packed tokens with shared prompts, and from a padded batch in
    which each sequence has its own copy of its prompt."""
    weights = torch.randn(segments.num_tokens, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(1))
    own = segments.sequence_of_token >= 0
    results = []
    for attention in ("alignlab", "eager"):
        policy.set_attn_implementation(attention)
        policy.zero_grad()
        hidden = hidden_states(policy, tokens, segments.position_ids, segments)
        (hidden * weights)[own].sum().backward()
        grads = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        results.append([hidden[own].detach(), *grads])
    return results


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6, deadline=None)
@given(packs(), st.integers(0, 9))
def test_packed_tokens_equal_unshared_padded_sequences(kind: str, groups: Any, seed: int) -> None:
    segments = make_segments(groups)
    tokens = torch.randint(0, 50, (segments.num_tokens,), generator=torch.Generator().manual_seed(seed))
    with really_float64():  # routers too, which compute in float32
        packed, padded = padded_and_packed(make_model(kind).double(), segments, tokens)
    assert len(packed) == len(padded) > 10
    for ours, theirs in zip(packed, padded, strict=True):
        assert (ours - theirs).abs().max() <= 1e-10 * max(1, float(theirs.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["alignlab", "eager"])
def test_decoding_from_a_cache_of_transformers_equals_the_full_forward(kind: str, attention: str) -> None:
    policy, tokens = make_model(kind, attention=attention), torch.randint(0, 50, (2, 13))
    with torch.no_grad():
        full = policy(tokens).logits
        step = policy(tokens[:, :4], use_cache=True)
        pieces = [step.logits]
        for index in range(4, 13):
            step = policy(tokens[:, index : index + 1], past_key_values=step.past_key_values)
            pieces.append(step.logits)
        last = policy.generate(tokens, max_new_tokens=1, do_sample=False)[:, -1]
    torch.testing.assert_close(torch.cat(pieces, dim=1), full, rtol=1e-4, atol=1e-4)
    assert torch.equal(last, full[:, -1].argmax(-1))


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind: str) -> None:
    tokens, gradients = torch.randint(0, 50, (1, 12)), []
    for checkpointing in (False, True):
        policy = make_model(kind).train()
        if checkpointing:
            policy.gradient_checkpointing_enable()
        policy(tokens, labels=tokens).loss.backward()
        gradients.append([parameter.grad for parameter in policy.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain is not None
        torch.testing.assert_close(plain, checkpointed)


def test_a_gate_scales_each_number_of_the_output() -> None:
    """One token attends to itself alone, so a layer is W_o (sigmoid(W_g x) * W_v x); one kv head serves all heads."""
    layer: Any = make_model("gated", use_qk_norm=False, num_key_value_heads=1).model.layers[0].self_attn
    x = torch.randn(1, 1, 32)
    rows = layer.q_proj(x).view(4, 2, 8)  # per head: query, gate
    expected = layer.o_proj((rows[:, 1].sigmoid() * layer.v_proj(x).view(1, 8)).flatten())
    rotation = (torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 1, 8))
    torch.testing.assert_close(layer(x, rotation)[0][0, 0], expected)


def test_a_sink_takes_its_share_of_the_softmax() -> None:
    """Scores 0 and log 3, sink log 4: weights 1/8 and 3/8, and 4/8 go to nothing."""
    query, key = torch.ones(1, 1, 2, 1), torch.tensor([0.0, 3.0]).log().nan_to_num(neginf=0.0).view(1, 1, 2, 1)
    value = torch.tensor([[8.0, 16.0]]).view(1, 1, 2, 1)
    sinks, segments = torch.tensor([4.0]).log(), Segments.single(2)
    out = packed_attention(query, key, value, segments, scaling=1.0, sinks=sinks)
    # The first token sees itself: e^0 / (e^0 + 4) of 8. The second: (1 * 8 + 3 * 16) / 8.
    torch.testing.assert_close(out[0, :, 0, 0], torch.tensor([8 / 5, 7.0]))


def test_only_the_first_part_of_a_head_is_rotated() -> None:
    layer: Any = make_model("partial-rotation", use_qk_norm=False).model.layers[0].self_attn
    assert layer.rotary_size == 4
    policy = make_model("no-positions")
    assert [layer.self_attn.rotary_size for layer in policy.model.layers] == [8, None]


def test_a_layer_without_positions_sees_a_set_of_tokens() -> None:
    """Without positions anywhere, the last token's state does not depend on the order of those before it."""
    tokens = torch.tensor([[3, 9, 4, 7, 11]])
    for kind, changes in (("no-positions", {"no_rope_layers": [0], "num_hidden_layers": 1}),
                          ("latent-without-positions",
                           {"no_rope_layers": [0], "num_hidden_layers": 1, "layer_types": ["latent_attention"]})):
        policy = make_model(kind, **changes)
        states = [policy.model(x).last_hidden_state[0, -1] for x in (tokens, tokens[:, [2, 0, 3, 1, 4]])]
        torch.testing.assert_close(*states, rtol=1e-5, atol=1e-5)
        policy = make_model(kind, **{**changes, "no_rope_layers": [1]})
        states = [policy.model(x).last_hidden_state[0, -1] for x in (tokens, tokens[:, [2, 0, 3, 1, 4]])]
        assert (states[0] - states[1]).abs().max() > 1e-3


SIZES = st.sampled_from([(4, 2, 8, 8), (4, 4, 12, 8), (6, 2, 8, 12), (4, 1, 24, 16)])  # heads, kv heads, key, value


@settings(max_examples=30, deadline=None)
@given(packs(), SIZES, st.sampled_from([None, 1, 4]), st.sampled_from([None, 1.5]), st.booleans())
def test_packed_attention_of_any_value_size_and_with_sinks_equals_the_dense_mask(
    groups: Any, sizes: tuple[int, int, int, int], window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    segments, (heads, kv_heads, key_size, value_size) = make_segments(groups), sizes
    generator = torch.Generator().manual_seed(0)
    shapes = [(heads, key_size), (kv_heads, key_size), (kv_heads, value_size)]
    x = [torch.randn(1, n, segments.num_tokens, d, generator=generator).double().requires_grad_() for n, d in shapes]
    sinks = torch.randn(heads, generator=generator).double().requires_grad_() if has_sinks else None
    inputs = [*x, *([] if sinks is None else [sinks])]
    options: dict[str, Any] = {"scaling": 0.4, "sliding_window": window, "softcap": softcap, "sinks": sinks}
    outputs = [attend(*x, segments, **options) for attend in (packed_attention, dense_attention)]
    weights = torch.randn(outputs[0].shape, generator=generator)
    ours, theirs = (torch.autograd.grad((output * weights).sum(), inputs) for output in outputs)
    torch.testing.assert_close(*outputs, rtol=1e-10, atol=1e-10)
    for mine, exact in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (4, None), (None, 1.5)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_flex_attention_of_any_value_size_and_with_sinks_equals_the_dense_mask(
    window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    segments = make_segments([(5, [3, 1, 6]), (7, []), (2, [4, 4])])
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(1, n, segments.num_tokens, d, generator=generator) for n, d in ((4, 12), (2, 12), (2, 8))]
    sinks = torch.randn(4, generator=generator) if has_sinks else None
    options: dict[str, Any] = {"scaling": 0.4, "sliding_window": window, "softcap": softcap, "sinks": sinks}
    out = flex_packed_attention(*x, segments, flex=flex_attention, **options)
    torch.testing.assert_close(out.double(), dense_attention(*x, segments, **options), rtol=1e-5, atol=1e-5)


def test_what_each_kind_keeps_of_a_token() -> None:
    heads, windowed = LayerCacheSpec.of_heads(2, 8, 8), LayerCacheSpec.of_heads(2, 8, 8, window=5)
    latent = LayerCacheSpec.of_latent(16, 12)
    kept = {"state": (2, 8, 8), "inputs": (3, 48)}
    recurrent = LayerCacheSpec(per_sequence=kept, float32_entries=frozenset({"state"}))
    specs = (heads, windowed, heads, windowed, latent, recurrent, recurrent, recurrent)
    assert cache_specs(make_model("all")) == dict(enumerate(specs))
    assert (heads.token_numel, latent.token_numel, latent.value_columns) == (32, 16, 12)


def test_all_linear_adapts_every_projection_of_every_kind() -> None:
    adapted = add_lora(make_model("all"), LoraSettings(rank=2))
    matrices = [name for name, _ in adapted.named_parameters() if "lora_A" in name]
    names = {name.split(".lora_A")[0].split(".layers.")[1] for name in matrices}
    in_latent = {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
    assert {name.split("self_attn.")[1] for name in names if name.startswith("4.self_attn")} == in_latent
    assert {name.split("self_attn.")[1] for name in names if name.startswith("2.self_attn")} == {
        "q_proj", "k_proj", "v_proj", "o_proj"
    }
    in_deltanet = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}
    assert {name.split("linear_attn.")[1] for name in names if name.startswith("5.linear_attn")} == in_deltanet
    in_kimi = {
        "q_proj", "k_proj", "v_proj", "forget_gate.f_a_proj", "forget_gate.f_b_proj", "b_proj", "g_a_proj", "g_b_proj",
        "o_proj",
    }  # fmt: skip
    assert {name.split("self_attn.")[1] for name in names if name.startswith("7.self_attn")} == in_kimi


HUB_FAMILIES = {
    "latent": "deepseek_v3", "latent-plain-query": "deepseek_v3", "norms-of-outputs": "olmo2",
    "latent-without-positions": "kimi_linear", "kimi-delta": "kimi_linear", "kimi-linear": "kimi_linear",
    "biased-experts": "gpt_oss",
}  # fmt: skip
"""Of the kinds that a family of the Hub has."""


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_is_read_back_and_stands_for_its_hub_family_alone(kind: str, tmp_path: Any) -> None:
    policy = make_model(kind)
    policy.save_pretrained(tmp_path)
    again = PolicyForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.layer_types == policy.config.layer_types
    tokens = torch.randint(0, 50, (1, 9))
    torch.testing.assert_close(again(tokens).logits, policy(tokens).logits)
    hub = write_hub_config(policy.config)
    assert (None if hub is None else hub.model_type) == HUB_FAMILIES.get(kind)


def test_the_readme_has_the_figures_that_the_layers_declare() -> None:
    text = (Path(__file__).parents[2] / "alignlab" / "models" / "README.md").read_text(encoding="utf-8")
    assert "\n".join(rows()) in text, "python -m tests.models.kinds_table"
    assert "\n".join(recurrent_rows()) in text, "python -m tests.models.kinds_table"
    assert {row[0] for row in (*ROWS, *RECURRENT_ROWS)} == set(ATTENTION_KINDS)


def test_the_table_names_every_kind() -> None:
    assert all(ATTENTION_KINDS[kind].has_window == kind.startswith("sliding_") for kind in ATTENTION_KINDS)
    assert len(set(ATTENTION_KINDS.values())) == len(ATTENTION_KINDS)


ALL_LATENT = {"layer_types": ["latent_attention"] * 2, **LATENT}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({**ALL_LATENT, "kv_lora_rank": None}, "kv_lora_rank is None, and must be given .* use 512"),
        ({**ALL_LATENT, "v_head_dim": 0}, "v_head_dim is 0, and must be given"),
        ({**ALL_LATENT, "qk_rope_head_dim": 5}, "qk_rope_head_dim is 5, and must be even for the rotation; use 6"),
        ({**ALL_LATENT, "q_lora_rank": 0}, "q_lora_rank is 0, and must be at least 1"),
        ({**ALL_LATENT, "use_qk_norm": True}, "use_qk_norm is true, and must be false where a layer is latent"),
        ({**ALL_LATENT, "sliding_window": 4}, "sliding_window is 4, .* leave it out"),
        ({**ALL_LATENT, "rope_parameters": PARTIAL}, "partial_rotary_factor is 0.5, but no layer rotates a part"),
        ({"kv_lora_rank": 8}, "kv_lora_rank is 8, but no layer is latent_attention; make one so or leave it out"),
        ({"rope_interleave": False}, "rope_interleave is False, but no layer is latent_attention"),
        ({"rope_parameters": {**PARTIAL, "partial_rotary_factor": 1.5}}, r"partial_rotary_factor is 1.5, .* \(0, 1\]"),
        ({"rope_parameters": {**PARTIAL, "partial_rotary_factor": 0.4}}, "head_dim is 8 and partial_rotary_factor 0.4"),
        ({"no_rope_layers": [1]}, r"no_rope_layers is \[1\], and must hold a number for each of the 2 layers"),
        ({"no_rope_layers": [1, 2]}, r"no_rope_layers is \[1, 2\]"),
        ({"layer_types": ["sliding_gated_attention"] * 2}, "sliding_window is None, .* give it"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "layer_types holds linear_attention; each entry"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_combinations_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_sinks_are_refused_by_an_attention_that_has_none(attention: str) -> None:
    with pytest.raises(ConfigError, match=f"attention_sinks is true, and attn_implementation is '{attention}'"):
        make_model("sinks", attention=attention)(torch.randint(0, 50, (1, 4)))


@pytest.mark.parametrize("kind", KINDS)
def test_generation_with_a_static_cache_is_right_or_refused_by_name(kind: str) -> None:
    model, tokens = make_model(kind), torch.arange(3, 12)[None]
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    others = set(model.config.layer_types) - {"full_attention", "sliding_attention"}
    if not others:
        static = model.generate(tokens, **options, cache_implementation="static")
        assert torch.equal(static, model.generate(tokens, **options))
        return
    message = f"cache_implementation is static, and there is no static cache for .*{min(others)}"
    with pytest.raises(ConfigError, match=message):
        model.generate(tokens, **options, cache_implementation="static")
    with pytest.raises(ConfigError, match=message):
        model.generate(tokens, GenerationConfig(**options, cache_implementation="static"))
