"""Merged modules, states and checkpoints against the live model with its adapters."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from alignlab.config.model import LoraSettings
from alignlab.errors import ConfigError
from alignlab.models.adapters import adapters_disabled, add_lora
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.checkpoints import load_model, save_model
from alignlab.models.hub.export import base_tensors, merged_tensors, write_base
from alignlab.models.merging import merge_adapter, merged_module, merged_state, unties, wrappers
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.embedded.weights import EngineWeights
from tests.models.conftest import SIZES

TOKENS = torch.tensor([[3, 9, 4, 7, 22, 5]])
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FORMS = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": ["q_proj"], "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "patterns": {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 9}},
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "embeddings_dora": {"target_modules": ["embed_tokens"], "use_dora": True},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "head_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
}


def make_base(*, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=tied, initializer_range=0.2)
    model = LlamaForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def shake(model: PeftModel) -> PeftModel:
    """Give every part of an adapter another value than it starts with."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if any(mark in name for mark in ("lora_", "modules_to_save", "trainable_tokens_delta")):
            parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.3).to(parameter.dtype)
    return model.eval()


def adapted(base: nn.Module, form: str) -> PeftModel:
    return shake(add_lora(base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, **FORMS[form])))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def folder_of(tmp_path, *, tied: bool) -> str:
    make_base(tied=tied).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_engine_checkpoint_and_merged_model_compute_what_the_live_model_computes(form, tied, tmp_path):
    base = load_model(folder_of(tmp_path, tied=tied), dtype=torch.float32)
    before = logits(base)
    model = adapted(base, form)
    live = logits(model)
    assert float((live - before).abs().max()) > 0.1, "the adapter does something"
    with adapters_disabled(model):
        torch.testing.assert_close(logits(model), before)
    with EngineWeights(model, merge=True, pack=False).in_use():
        assert not {type(module) for module in model.modules()} & set(map(type, wrappers(model).values()))
        torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(model), live)

    sent, kept = merged_tensors(model), base_tensors(model)
    assert sent.keys() == kept.keys()
    for tensors, wanted in ((sent, live), (kept, before)):
        write_base(model, tmp_path)
        twin = LlamaForCausalLM(LlamaConfig.from_pretrained(tmp_path)).eval()
        result = twin.load_state_dict(tensors, strict=False)
        twin.tie_weights()
        assert not result.unexpected_keys and set(result.missing_keys) <= {"lm_head.weight"}
        torch.testing.assert_close(logits(twin), wanted, rtol=1e-4, atol=1e-4)

    save_model(merge_adapter(model), tmp_path / "merged")
    for load in (lambda folder: AutoModelForCausalLM.from_pretrained(folder).eval(), our_load):
        torch.testing.assert_close(logits(load(tmp_path / "merged")), live, rtol=1e-4, atol=1e-4)


def our_load(folder) -> nn.Module:
    return load_model(str(folder), dtype=torch.float32)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_merging_unties_embeddings_that_an_adapter_changed(target, tmp_path):
    base = load_model(folder_of(tmp_path, tied=True), dtype=torch.float32)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = shake(get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", target])))
    live = logits(model)
    assert unties(model)
    merged = merge_adapter(model)
    torch.testing.assert_close(logits(merged), live, rtol=1e-4, atol=1e-4)
    save_model(merged, tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()
    torch.testing.assert_close(logits(loaded), live, rtol=1e-4, atol=1e-4)


def test_tied_tokens_stay_tied(tmp_path):
    model = adapted(load_model(folder_of(tmp_path, tied=True), dtype=torch.float32), "tokens")
    assert not unties(model) and "lm_head.weight" not in merged_tensors(model)
    save_model(merge_adapter(model), tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.tie_word_embeddings


def test_gpt2_merges_its_transposed_layers():
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64, vocab_size=97)).eval()
    model = shake(add_lora(base, LoraSettings(rank=4)))
    live = logits(model)
    with EngineWeights(model, merge=True, pack=False).in_use():
        torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(merge_adapter(model)), live, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["plain", "dora", "embeddings"])
def test_merged_weights_are_rounded_once(form):
    model = adapted(make_base(tied=False).bfloat16(), form)
    for wrapper in wrappers(model).values():
        double = copy.deepcopy(wrapper).double()
        double.merge(safe_merge=True)
        merged, wanted = merged_module(wrapper).weight, double.get_base_layer().weight
        assert merged.dtype == torch.bfloat16
        assert (merged != wanted.bfloat16()).double().mean() < 0.02, "up to ties broken by float32 rounding"


def test_merging_shares_tensors_without_an_adapter():
    model = adapted(make_base(tied=False), "rslora")
    state, live = merged_state(model), dict(model.get_base_model().state_dict())
    shared = {name for name in state if name in live and state[name].data_ptr() == live[name].data_ptr()}
    queries = {f"model.layers.{i}.self_attn.q_proj.{part}" for i in (0, 1) for part in ("weight", "bias")}
    assert set(state) - shared == queries, "whose names are others in the live model"


def test_an_adapter_that_cannot_be_merged_is_refused_by_the_engine():
    config = LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True)
    with pytest.warns(UserWarning, match="lora_bias"):
        model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SIZES)), config)
    with pytest.raises(ConfigError, match=r"lora_bias is set, and .*q_proj has no bias"):
        EngineWeights(model, merge=True, pack=False)


def test_experts_are_merged_expert_by_expert():
    torch.manual_seed(0)
    model = shake(add_lora(PolicyForCausalLM(PolicyConfig(**SIZES, **MOE)).eval(), LoraSettings(rank=3, experts=True)))
    live = logits(model)
    with EngineWeights(model, merge=True, pack=False).in_use():
        torch.testing.assert_close(logits(model), live, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(merge_adapter(model)), live, rtol=1e-4, atol=1e-4)
