"""Declared cache specs against the tensors that layers hand to the attention function."""

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from alignlab.config.model import LoraSettings
from alignlab.errors import ConfigError
from alignlab.models.adapters import add_lora
from alignlab.models.cache_spec import LayerCacheSpec, _measured, cache_specs
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm
from alignlab.models.transformer import PolicyForCausalLM
from tests.models.conftest import SIZES


def make_policy(**options) -> PolicyForCausalLM:
    torch.manual_seed(0)
    model = PolicyForCausalLM(PolicyConfig(**SIZES | options)).eval()
    model.set_attn_implementation("alignlab")
    return model


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_declared_spec_is_what_the_layer_hands_to_attention(kv_heads):
    types = ["full_attention", "sliding_attention"]
    model = make_policy(num_key_value_heads=kv_heads, layer_types=types, sliding_window=5)
    key = {"key": (kv_heads, 8), "value": (kv_heads, 8)}
    assert cache_specs(model) == {0: LayerCacheSpec(key), 1: LayerCacheSpec(key, window=5)}
    assert cache_specs(model) == _measured(model)
    assert cache_specs(model)[0].token_numel == 2 * kv_heads * 8


def test_an_adapter_on_the_projections_leaves_the_spec():
    model = make_policy()
    before = cache_specs(model)
    adapted = add_lora(model, LoraSettings(rank=2, target_modules=["k_proj", "v_proj"]))
    assert cache_specs(adapted) == before


def test_layers_of_transformers_are_measured():
    config = Gemma2Config(**SIZES, layer_types=["sliding_attention", "full_attention"], sliding_window=6)
    model = Gemma2ForCausalLM(config).train()
    model.set_attn_implementation("alignlab")
    specs = cache_specs(model)
    assert model.training
    assert specs == {0: LayerCacheSpec.of_heads(2, 8, 8, window=6), 1: LayerCacheSpec.of_heads(2, 8, 8)}


def test_a_model_with_another_attention_is_refused():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50))
    with pytest.raises(ConfigError, match="needs attention 'alignlab'"):
        cache_specs(model)


def test_states_of_sequences_count_apart_from_tokens():
    spec = LayerCacheSpec({"latent": (6,)}, {"state": (2, 3, 3)})
    assert (spec.token_numel, spec.sequence_bytes(torch.bfloat16)) == (6, 36)
    assert causal_lm(make_policy()).config.num_hidden_layers == len(cache_specs(make_policy()))
