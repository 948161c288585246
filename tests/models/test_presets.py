"""Presets: their models compute and learn, have the sizes that are shown, and refuse what does not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.errors import ConfigError
from alignlab.models.cache_spec import cache_specs
from alignlab.models.decoder import hidden_states
from alignlab.models.hub.checkpoints import load_model, new_model, save_model
from alignlab.models.hub.families import write_hub_config
from alignlab.models.model_sizes import model_sizes
from alignlab.models.presets import PRESETS, pattern, preset_config, preset_names
from alignlab.models.transformer import PolicyForCausalLM
from tests.models.conftest import make_segments

FAMILIES = {
    "gqa": "llama", "gemma2": "gemma2", "gemma3": "gemma3_text", "olmo2": "olmo2", "mla": "deepseek_v3",
    "deepseek_v3": "deepseek_v3", "moe": "mixtral", "qwen3_next": "qwen3_next", "kimi_linear": "kimi_linear",
    "kda": "kimi_linear", "gpt_oss": "gpt_oss",
}  # fmt: skip


@pytest.mark.parametrize("name", preset_names())
def test_a_model_of_a_preset_computes_packs_and_every_weight_learns(name: str) -> None:
    torch.manual_seed(0)
    model = PolicyForCausalLM(preset_config(name, vocab_size=50)).train()
    segments = make_segments([(5, [3, 1, 6]), (7, []), (140, [4, 4])])
    tokens = torch.randint(0, 50, (segments.num_tokens,))
    hidden = hidden_states(model, tokens, segments.position_ids, segments)
    model.lm_head(hidden).log_softmax(-1)[:, 0].sum().backward()
    for key, parameter in model.named_parameters():
        learns_elsewhere = "baseline" in key or "noise" in key or key.startswith("mtp.")  # from losses of their own
        assert learns_elsewhere or (parameter.grad is not None and parameter.grad.isfinite().all()), key


@pytest.mark.parametrize("name", preset_names())
def test_activations_keep_their_variance_with_depth(name: str) -> None:
    """At the start, what a layer adds to the residual stream neither vanishes nor grows from layer to layer."""
    torch.manual_seed(0)
    config = preset_config(name, vocab_size=50, num_hidden_layers=12, hidden_size=128)
    model = PolicyForCausalLM(config).eval()
    with torch.no_grad():
        states = model.model(torch.randint(0, 50, (2, 64)), output_hidden_states=True).hidden_states
    variances = torch.stack([state.float().var(-1).mean() for state in states[:-1]])  # the last is under the final norm
    added = variances[1:] - variances[:-1]
    assert variances.isfinite().all() and variances[-1] > variances[0]
    assert added[-4:].mean() < 3 * added.mean(), "residuals grow no faster than in proportion to the depth"
    assert (added[2:] < 4 * added.mean()).all(), added


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_is_written_as_its_hub_family(name: str) -> None:
    hub = write_hub_config(preset_config(name, vocab_size=50))
    assert (None if hub is None else hub.model_type) == FAMILIES.get(name)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_a_preset_with_a_tied_head_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = new_model({"preset": name, "tie_word_embeddings": True}, vocab_size=50)
    save_model(model, tmp_path / "model")
    again = load_model(str(tmp_path / "model"), dtype=torch.float32)
    ids = torch.arange(9)[None]
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    torch.testing.assert_close(again(ids).logits, model(ids).logits)


def test_names_that_the_papers_are_known_by() -> None:
    names = {
        "mla", "gated_attention", "gated_deltanet", "kda", "gemma2", "gemma3", "qwen3_next", "kimi_linear",
        "deepseek_v3", "parallel", "expert_choice", "hash", "base_assignment", "noisy_topk", "mtp", "moa",
    }  # fmt: skip
    assert names <= set(PRESETS)


def test_a_pattern_ends_with_its_last_kind() -> None:
    assert pattern("aab", 6) == ["a", "a", "b", "a", "a", "b"]
    assert pattern("aab", 5) == ["a", "a", "b", "a", "b"]


def test_sizes_of_a_mixture_by_hand() -> None:
    """Hidden size 16, 2 layers, 2 heads of 8, 1 kv head, 4 experts of width 8, 2 a token, vocabulary 10."""
    config = preset_config(
        "moe", vocab_size=10, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, num_experts=4, moe_intermediate_size=8,
    )
    attention, router, expert, head = 16 * (16 + 8 + 8 + 16), 4 * 16, 3 * 8 * 16, 10 * 16
    sizes = model_sizes(config)
    assert sizes.active_parameters == 2 * (attention + router + 2 * expert) + head
    assert sizes.parameters == 2 * (attention + router + 4 * expert + 2 * 16) + 16 + 2 * head
    assert sizes.flops_per_token == 2 * sizes.active_parameters
    assert (sizes.cache_bytes_per_token, sizes.state_bytes) == (2 * 2 * 2 * 8, 0)
    assert sizes.aspect_ratio == 8


@pytest.mark.parametrize("name", ["gemma2", "kimi_linear", "gated_deltanet", "deepseek_v3"])
def test_sizes_are_those_of_the_model(name: str) -> None:
    config = preset_config(name, vocab_size=50)
    model, sizes = PolicyForCausalLM(config), model_sizes(config)
    assert sizes.parameters == sum(parameter.numel() for parameter in model.parameters())
    specs = cache_specs(model.bfloat16()).values()
    assert sizes.state_bytes == sum(spec.sequence_bytes(torch.bfloat16) for spec in specs)
    assert sizes.cache_bytes_per_token == 2 * sum(spec.token_numel for spec in specs)


def test_an_architecture_may_name_a_preset() -> None:
    model = new_model({"preset": "gemma3", "hidden_size": 32, "num_hidden_layers": 6}, vocab_size=30)
    assert model.config.layer_types == ["sliding_attention"] * 5 + ["full_attention"]
    assert model.config.embedding_multiplier == 32**0.5


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"preset": "gemma4"}, "preset is 'gemma4', and there is none of this name; did you mean gemma3"),
        ({"preset": ["mla"]}, "preset is \\['mla'\\], and there is none of this name"),
        ({"preset": "kda", "hidden_size": "large"}, "hidden_size is 'large', and must be a whole number of at least 1"),
        ({"preset": "kda", "hidden_size": 0}, "hidden_size is 0, and must be a whole number of at least 1; use 64"),
        ({"preset": "gqa", "num_attention_heads": 0}, "num_attention_heads is 0, and must be a whole number"),
        ({"preset": "gqa", "head_dim": -8}, "head_dim is -8, and must be a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, and must be a whole number of at least 1; use 8"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0, and must be a whole number"),
        ({"preset": "gemma3", "num_hidden_layers": 1}, "num_hidden_layers is 1, and must be at least 2 in a"),
        ({"preset": "kda", "attention_dropout": 0.1}, "attention_dropout is 0.1, but all layers are recurrent"),
        ({"preset": "kda", "attention_sinks": True}, "attention_sinks is True, but all layers are recurrent"),
        ({"preset": "kda", "use_qk_norm": True}, "use_qk_norm is True, but all layers are recurrent"),
        ({"preset": "kda", "attn_logit_softcapping": 9.0}, "attn_logit_softcapping is 9.0, but all layers are rec"),
        ({"preset": "gqa", "rope_theta": "long"}, "rope_theta is 'long', and must be a positive number; use 10000"),
        ({"preset": "gqa", "use_qk_norm": 5}, "use_qk_norm"),
        ({"preset": "x"}, "there is none of this name; known are base_assignment, "),
        ({"preset": "mla", "layer_kinds": []}, "layer_kinds is not a field of PolicyConfig; did you mean layer_types"),
        ({"preset": "mla", "use_qk_norm": True}, "use_qk_norm is true, and must be false where a layer is latent"),
        ({"preset": "parallel", "norm_position": "post"}, "parallel_attn is true with norm_position post"),
        ({"preset": "deepseek_v3", "n_group": 3}, "n_group is 3, and must divide num_experts"),
        ({"preset": "gated_deltanet", "sliding_window": 4}, "sliding_window is 4, and must be given exactly where"),
        ({"preset": "gqa", "router_type": "hash"}, "router_type is 'hash', but no layer is sparse"),
    ],
    ids=str,
)  # fmt: skip
def test_pieces_that_exclude_each_other_are_named(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_model(architecture, vocab_size=30)


def test_a_field_of_another_type_is_named() -> None:
    with pytest.raises(ConfigError, match=r"(?s)preset gqa: .*use_qk_norm"):
        preset_config("gqa", vocab_size=30, use_qk_norm=5)
