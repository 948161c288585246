"""Dropout of a model's own layers is off in training; an adapter's own stays."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    OPTConfig,
    PhiConfig,
    PreTrainedConfig,
    SeedOssConfig,
)

from alignlab.config.model import LoraSettings
from alignlab.models.adapters import add_lora
from alignlab.models.config import PolicyConfig
from alignlab.models.dropout import switch_off_dropout
from alignlab.models.policy import Policy
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.types import Segments

TOKENS = torch.tensor([3, 9, 4, 7, 22, 5])
BODY = {"vocab_size": 48, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DROPPING: list[PreTrainedConfig] = [
    GPT2Config(vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    OPTConfig(**BODY, ffn_dim=64, word_embed_proj_dim=32, attention_dropout=0.2, dropout=0.2, layerdrop=0.5),
    SeedOssConfig(**BODY, intermediate_size=64, num_key_value_heads=2, head_dim=8, residual_dropout=0.2),
    PhiConfig(**BODY, intermediate_size=64, resid_pdrop=0.2, embd_pdrop=0.2, attention_dropout=0.2),
    FalconConfig(**BODY, hidden_dropout=0.2, attention_dropout=0.2),
]


@pytest.mark.parametrize("config", DROPPING, ids=lambda config: config.model_type)
def test_a_model_in_training_computes_what_it_computes_in_evaluation(config):
    torch.manual_seed(0)
    packs = config.model_type != "falcon"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="alignlab" if packs else "eager").train()
    policy, mask = Policy(model), torch.arange(6) > 0
    values = switch_off_dropout(model)
    assert values and all(0 < value <= 1 for value in values.values())
    trained = policy.train()(TOKENS, Segments.single(6), mask).logprobs
    torch.testing.assert_close(trained, policy.eval()(TOKENS, Segments.single(6), mask).logprobs)
    assert switch_off_dropout(model) == {}, "and it stays so"


def test_an_adapter_keeps_its_own_dropout():
    model = PolicyForCausalLM(PolicyConfig(**BODY, intermediate_size=64, attention_dropout=0.3))
    adapted = add_lora(model, LoraSettings(rank=2, dropout=0.25))
    assert switch_off_dropout(adapted) == {"attention_dropout": 0.3}
    assert {module.p for module in adapted.modules() if isinstance(module, torch.nn.Dropout)} == {0.25}
