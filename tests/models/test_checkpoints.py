"""Checkpoints in both directions: ours load in `transformers` and `peft`, and theirs load here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from alignlab.config.model import LoraSettings
from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import check_checkpoint, load_model, load_tokenizer, new_model, save_model
from alignlab.models.hub.families import FAMILIES
from alignlab.models.policy import Policy
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.types import Segments
from tests.models.test_parity import HUB, SIZES

TINY: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.3,
}
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
TOKENS = torch.arange(3, 21).view(2, 9)


def hub_folder(name: str, folder: Path) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(HUB[name](), attn_implementation="eager").eval()
    model.save_pretrained(folder)
    return model


def weights(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", HUB)
def test_a_hub_checkpoint_is_written_back_unchanged(name: str, tmp_path: Path) -> None:
    theirs = hub_folder(name, tmp_path / "hub")
    ours = load_model(str(tmp_path / "hub"), dtype=torch.float32)
    assert type(ours) is PolicyForCausalLM and not ours.training
    torch.testing.assert_close(logits(ours), logits(theirs))
    save_model(ours, tmp_path / "back")
    before, after = weights(tmp_path / "hub"), weights(tmp_path / "back")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("hub", "back")]
    assert ours.config.hub_config is not None
    of_vllm = FAMILIES[configs[0]["model_type"]].for_vllm(ours.config)
    assert of_vllm | configs[0] == configs[1]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager")
    assert type(again) is type(theirs)
    torch.testing.assert_close(logits(again), logits(theirs))


@pytest.mark.parametrize(
    ("changes", "model_type"),
    [
        ({}, "llama"),
        ({"attention_bias": True, "attention_out_bias": False}, "qwen2"),
        ({"use_qk_norm": True, "head_dim": 12}, "qwen3"),
        (MOE, "mixtral"),
        ({**MOE, "use_qk_norm": True, "mlp_layer_types": ["dense", "sparse"]}, "qwen3_moe"),
        ({**MOE, "norm_topk_prob": False, "use_qk_norm": True}, "qwen3_moe"),
        ({**MOE, "router_bias_update_rate": 0.1, "n_shared_experts": 1, "scoring_func": "sigmoid"}, "alignlab_policy"),
        ({"attn_logit_softcapping": 4.0}, "alignlab_policy"),
        ({"use_qk_norm": True, "mlp_bias": True}, "alignlab_policy"),
        ({"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3}, "alignlab_policy"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 3, "use_qk_norm": True}, "qwen3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_new_model_is_written_as_its_family(changes: dict[str, Any], model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = new_model({**TINY, **changes}, vocab_size=30, eos_token_id=2, pad_token_id=0)
    for router in (module for module in model.modules() if hasattr(module, "e_score_correction_bias")):
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_()
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == model_type
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (type(theirs) is PolicyForCausalLM) == (model_type not in FAMILIES)
    ours = load_model(str(tmp_path), dtype=torch.float32)
    assert type(ours) is PolicyForCausalLM and ours.generation_config.eos_token_id == 2
    for other in (ours, theirs):
        torch.testing.assert_close(logits(other), logits(model))


def test_weights_load_in_the_requested_dtype_and_rotary_and_router_stay_float32(tmp_path: Path) -> None:
    save_model(new_model({**TINY, **MOE, "router_bias_update_rate": 0.1}, vocab_size=30), tmp_path)
    model = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}
    assert model(TOKENS).logits.dtype == torch.bfloat16


def test_tied_embeddings_stay_one_tensor(tmp_path: Path) -> None:
    hub_folder("llama-multi-query-tied", tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["llama", "gemma3", "olmo2", "phi3"])
def test_an_adapter_is_read_by_plain_peft(name: str, tmp_path: Path) -> None:
    theirs = hub_folder(name, tmp_path / "base")
    torch.manual_seed(1)
    base: Any = load_model(str(tmp_path / "base"), dtype=torch.float32)
    tuned = add_lora(base, LoraSettings(rank=4))
    for key, parameter in tuned.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.eval()
    save_model(tuned, tmp_path / "adapter")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "base")
    plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32).eval()
    assert type(plain.get_base_model()) is type(theirs)
    torch.testing.assert_close(logits(plain), logits(tuned))
    assert (logits(tuned) - logits(tuned.get_base_model())).abs().max() == 0, "adapters sit inside the base"
    reloaded = load_model(str(tmp_path / "adapter"), dtype=torch.float32)
    assert isinstance(reloaded, PeftModel)
    torch.testing.assert_close(logits(reloaded), logits(tuned))
    with tuned.disable_adapter():
        assert (logits(tuned) - logits(reloaded)).abs().max() > 1e-3


def test_a_resized_vocabulary_is_written_back(tmp_path: Path) -> None:
    hub_folder("llama", tmp_path / "hub")
    model = load_model(str(tmp_path / "hub"), dtype=torch.float32)
    model.resize_token_embeddings(64)
    save_model(model, tmp_path / "back")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.config.vocab_size == 64
    torch.testing.assert_close(logits(again), logits(model))


def test_an_unknown_architecture_is_transformers_own(tmp_path: Path) -> None:
    sizes = {key: value for key, value in SIZES.items() if key != "initializer_range"}
    theirs = AutoModelForCausalLM.from_config(MistralConfig(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32)
    assert type(model).__name__ == "MistralForCausalLM" and model.config._attn_implementation == "alignlab"
    torch.testing.assert_close(logits(model), logits(theirs))


def test_a_known_family_with_an_unknown_option_is_transformers_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, hidden_act="relu2")).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="alignlab.models.hub.checkpoints"):
        model = load_model(str(tmp_path), dtype=torch.float32)
    assert type(model).__name__ == "LlamaForCausalLM" and "relu2" in caplog.text


def test_pickled_weights_and_missing_checkpoints_are_refused(tmp_path: Path) -> None:
    model = hub_folder("llama", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="safetensors"):
        load_model(str(tmp_path), dtype=torch.float32)
    with pytest.raises(CheckpointError, match="nowhere"):
        load_model(str(tmp_path / "nowhere"), dtype=torch.float32)
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("llama", lambda w: w.pop("model.layers.1.mlp.down_proj.weight"), r"missing model\.layers\.1\.mlp\.down_proj"),
        ("llama", lambda w: w.pop("lm_head.weight"), r"missing lm_head\.weight \(1 in all\)"),
        ("qwen2", lambda w: w.pop("model.layers.0.self_attn.q_proj.bias"), r"missing model\.layers\.0\.self_attn"),
        ("llama", lambda w: w.update({"model.layers.0.extra": torch.ones(3)}), r"unexpected model\.layers\.0\.extra"),
        ("llama", lambda w: w.update({"model.norm.weight": torch.ones(3)}), "cannot be loaded|mismatched"),
        ("qwen3-moe", lambda w: w.pop("model.layers.0.mlp.experts.2.up_proj.weight"), "cannot be loaded|missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused(name: str, change: Any, message: str, tmp_path: Path) -> None:
    """`transformers` would fill missing tensors with random numbers, and skip those that do not fit."""
    hub_folder(name, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    change(weights)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=message):
        load_model(str(tmp_path), dtype=torch.float32)


def test_a_checkpoint_is_checked_without_reading_its_weights(tmp_path: Path) -> None:
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    hub_folder("llama", model)
    save_model(add_lora(load_model(str(model), dtype=torch.float32), LoraSettings(rank=2)), adapter)
    check_checkpoint(str(model))
    check_checkpoint(str(adapter))
    config = adapter / "adapter_config.json"
    kept = config.read_text()
    config.write_text(kept.replace('"CAUSAL_LM"', '"SEQ_CLS"'))
    with pytest.raises(CheckpointError, match="is a reward model"):
        check_checkpoint(str(adapter))
    config.write_text(kept)
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere"):
        check_checkpoint(str(tmp_path / "nowhere"))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    for name in (model, adapter):  # an adapter is checked together with its base
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            check_checkpoint(str(name))
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_model(str(model), dtype=torch.float32)
    weights.unlink()
    with pytest.raises(CheckpointError, match="must hold safetensors"):
        check_checkpoint(str(model))
    (model / "config.json").unlink()
    save_file({"x": torch.ones(1)}, weights)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        check_checkpoint(str(model))


def test_a_tokenizer_without_padding_pads_with_its_end_token(tmp_path: Path) -> None:
    words = WordLevel({"<unk>": 0, "<end>": 1, "a": 2}, unk_token="<unk>")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="<end>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).pad_token_id == 1


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"hiden_size": 16}, "did you mean hidden_size"),
        ({"vocab_size": 16}, "comes from the tokenizer"),
        ({"zzz": 1}, "known are"),
        ({"hidden_size": "16"}, "hidden_size"),
    ],
)
def test_wrong_architectures_are_named(architecture: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        new_model(architecture, vocab_size=30)


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    """BERT's causal class is a decoder only if its config says so."""
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    for is_decoder in (False, True):
        torch.manual_seed(0)
        config = BertConfig(**sizes, num_attention_heads=4, is_decoder=is_decoder)
        BertLMHeadModel(config).save_pretrained(tmp_path / str(is_decoder))
    with pytest.raises(CheckpointError, match=r"False is an encoder \(BertLMHeadModel\).*set is_decoder to true"):
        load_model(str(tmp_path / "False"), dtype=torch.float32)
    load_model(str(tmp_path / "True"), dtype=torch.float32)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    config = T5Config(vocab_size=48, d_model=32, d_ff=64, num_layers=1, num_heads=4, d_kv=8)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    for use in (check_checkpoint, lambda name: load_model(name, dtype=torch.float32)):
        with pytest.raises(CheckpointError, match=r"is an encoder-decoder \(t5\), and must be a decoder alone"):
            use(str(tmp_path))


def test_a_model_that_cannot_be_packed_gets_its_own_attention_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    config = Lfm2Config(
        **sizes, num_attention_heads=4, num_key_value_heads=2, layer_types=["full_attention", "conv"], pad_token_id=0
    )
    Lfm2ForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=torch.float32)
    assert model.config._attn_implementation == "sdpa"
    assert "Lfm2ForCausalLM has layers of type conv, which cannot be packed" in caplog.text
    tokens = torch.tensor([3, 9, 4, 7])
    logprobs = Policy(model)(tokens, Segments.single(4), torch.arange(4) > 0).logprobs
    wanted = model(tokens[None]).logits[0].log_softmax(-1)[:-1].gather(1, tokens[1:, None])[:, 0]
    torch.testing.assert_close(logprobs[1:], wanted, rtol=1e-4, atol=1e-4)
