"""Reward models: `transformers` and PEFT compute the same from the saved folder; a role equals a copy."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    GPTNeoXConfig,
    MambaConfig,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from alignlab.config.model import LoraSettings
from alignlab.data.packing import pack_rollouts
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import load_model, new_model, save_model
from alignlab.models.hub.reward_checkpoints import (
    classifier_of,
    load_reward_model,
    load_reward_role,
    padded_tokenizer,
    save_reward_model,
)
from alignlab.models.moe import expert_counts
from alignlab.models.reward_model import RewardModel, last_tokens
from alignlab.types import Completion, Experience, Prompt, Rollout
from tests.models.conftest import make_segments

DENSE: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.2,
}
SPARSE = DENSE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "use_qk_norm": True}
SHAPES = {
    "llama": (DENSE, "LlamaForSequenceClassification"),
    "llama-tied": (DENSE | {"tie_word_embeddings": True}, "LlamaForSequenceClassification"),
    "qwen3": (DENSE | {"use_qk_norm": True}, "Qwen3ForSequenceClassification"),
    "qwen3-moe": (SPARSE, "Qwen3MoeForSequenceClassification"),
    "no-family": (SPARSE | {"n_shared_experts": 1}, "PolicyForSequenceClassification"),
    "gemma3": (DENSE | {
        "norm_type": "zero_centered_rmsnorm", "norm_position": "sandwich", "embedding_multiplier": 32**0.5,
        "use_qk_norm": True, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"],
        "rope_local_base_freq": 100.0, "tie_word_embeddings": True,
    }, "Gemma3TextForSequenceClassification"),
    "phi3": (DENSE | {"fused_projections": True}, "Phi3ForSequenceClassification"),
}  # fmt: skip
TINY = {
    "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 20,
}
SEQUENCES = [[5, 9, 1], [4, 3, 8, 30, 22, 1], [7, 1], [40, 41, 42, 43, 44]]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["abc abd ab ba 123"], vocab_size=262)


def new(shape: dict[str, Any], tokenizer: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return new_model(shape, vocab_size=len(tokenizer), pad_token_id=1, eos_token_id=1)


def excited(model: Any, seed: int = 3) -> Any:
    """An adapter with random weights, which changes the model's output."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    return model


def as_packs(sequences: list[list[int]], *, budget: int = 10) -> list[Experience]:
    def group(first: int, *rest: int) -> Rollout:
        return Rollout(Prompt((first,), ""), (Completion.of(rest),))

    return pack_rollouts([group(*ids) for ids in sequences], budget=budget)


def ours(reward: RewardModel) -> Tensor:
    return reward.rewards(as_packs(SEQUENCES), len(SEQUENCES))


def theirs(model: Any, tokenizer: Any, side: str) -> Tensor:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = side
    batch = tokenizer.pad({"input_ids": SEQUENCES}, return_tensors="pt")
    with torch.no_grad():
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0]
    return logits


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_computes_the_same_from_the_saved_folder(
    shape: str, side: str, tokenizer: Any, tmp_path: Path
) -> None:
    reward = RewardModel(new(SHAPES[shape][0], tokenizer))
    save_reward_model(reward, tmp_path, padded_tokenizer(tokenizer))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert type(model).__name__ == SHAPES[shape][1] and model.config.num_labels == 1
    found = ours(reward)
    other = theirs(model, AutoTokenizer.from_pretrained(tmp_path), side)
    torch.testing.assert_close(other, found, rtol=1e-5, atol=1e-5)
    assert float(found.std()) > 0.01
    torch.testing.assert_close(ours(load_reward_model(str(tmp_path))), found, rtol=0, atol=0)


@pytest.mark.parametrize("shape", ["llama", "qwen3-moe", "phi3"])
def test_peft_computes_the_same_from_a_saved_adapter(shape: str, tokenizer: Any, tmp_path: Path) -> None:
    save_model(new(SHAPES[shape][0], tokenizer), tmp_path / "base")
    base = load_model(str(tmp_path / "base"), dtype=torch.float32)
    torch.manual_seed(1)
    reward = RewardModel(excited(add_lora(base, LoraSettings(rank=2))))
    padded = padded_tokenizer(tokenizer)
    save_reward_model(reward, tmp_path / "adapter", padded)
    model = AutoPeftModelForSequenceClassification.from_pretrained(
        tmp_path / "adapter", num_labels=1, pad_token_id=padded.pad_token_id
    ).eval()
    found = ours(reward)
    torch.testing.assert_close(theirs(model, padded, "right"), found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(load_reward_model(str(tmp_path / "adapter"))), found, rtol=0, atol=0)
    bare = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, pad_token_id=padded.pad_token_id
    )
    other = PeftModel.from_pretrained(bare, tmp_path / "adapter").eval()
    torch.testing.assert_close(theirs(other, padded, "left"), found, rtol=1e-5, atol=1e-5)


def test_a_reward_is_read_at_the_last_token_of_each_sequence() -> None:
    segments = make_segments([(5, [3, 1]), (4, [])])
    assert last_tokens(segments).tolist() == [7, 8, 12]


@pytest.mark.parametrize("shape", [DENSE, SPARSE], ids=["dense", "experts"])
def test_a_role_on_a_policy_s_base_is_as_a_copy(shape: Any, tokenizer: Any, tmp_path: Path) -> None:
    save_model(new(shape, tokenizer), tmp_path / "base")
    lora = LoraConfig(r=3, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, use_rslora=True)  # not the policy's
    own = RewardModel(excited(add_lora(load_model(str(tmp_path / "base"), dtype=torch.float32), lora)))
    save_reward_model(own, tmp_path / "adapter", tokenizer)
    policy = excited(add_lora(load_model(str(tmp_path / "base"), dtype=torch.float32), LoraSettings(rank=2)), seed=8)
    policy.train()
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    before = policy(torch.tensor(SEQUENCES[:1])).logits
    shared = load_reward_role(policy, str(tmp_path / "adapter"), "reward")
    counted = expert_counts(policy).sum() if "num_experts" in shape else 0
    assert torch.equal(ours(shared), ours(own))
    assert "num_experts" not in shape or expert_counts(policy).sum() == counted > 0
    assert policy.training and policy.active_adapter == "default" and policy.base_model.model.training
    assert {name for name, p in policy.named_parameters() if p.requires_grad} == trained
    assert torch.equal(policy(torch.tensor(SEQUENCES[:1])).logits, before)
    load_reward_role(policy, str(tmp_path / "adapter"), "reward")  # a later trainer's, in its place
    assert sorted(policy.peft_config) == ["default", "reward"]


def test_sequences_that_are_in_no_pack_have_no_reward(tokenizer: Any) -> None:
    found = RewardModel(new(DENSE, tokenizer)).rewards(as_packs(SEQUENCES), len(SEQUENCES) + 1)
    assert found[-1].isnan() and not found[:-1].isnan().any()


def test_a_bfloat16_base_has_a_float32_head(tokenizer: Any, tmp_path: Path) -> None:
    save_model(new(DENSE, tokenizer), tmp_path / "base")
    base = load_model(str(tmp_path / "base"), dtype=torch.bfloat16)
    reward = RewardModel(excited(add_lora(base, LoraSettings(rank=2))))
    assert reward.score.weight.dtype == torch.float32 and ours(reward).dtype == torch.float32
    save_reward_model(reward, tmp_path / "adapter", tokenizer)
    again = load_reward_model(str(tmp_path / "adapter"))
    assert again.model.dtype == torch.bfloat16 and torch.equal(ours(again), ours(reward))


def test_a_padding_token_is_not_the_end_token(tokenizer: Any) -> None:
    ends = copy.deepcopy(tokenizer)
    ends.pad_token = ends.eos_token
    ends.add_special_tokens({"bos_token": "<start>", "additional_special_tokens": ["<other>"]})
    assert padded_tokenizer(ends).pad_token not in (ends.eos_token, "<start>") and ends.pad_token == ends.eos_token
    kept = copy.deepcopy(tokenizer)
    kept.add_special_tokens({"pad_token": "<pad>"})
    assert padded_tokenizer(kept).pad_token == "<pad>"
    words = Tokenizer(WordLevel({"<end>": 0, "a": 1}, unk_token="a"))
    only = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    with pytest.raises(ConfigError, match="needs a padding token that is not the end token '<end>'"):
        padded_tokenizer(only)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BertConfig(is_decoder=True, **TINY), "BertForSequenceClassification has another head than a reward model's"),
        (MambaConfig(hidden_size=8, num_hidden_layers=1, vocab_size=20), "no sequence-classification model of Mamba"),
    ],
)
def test_architectures_that_cannot_be_saved_are_named(config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        classifier_of(AutoModelForCausalLM.from_config(config), 0)


def test_other_architectures_go_through_their_own_classes(tmp_path: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    config = GPTNeoXConfig(**TINY | {"vocab_size": len(tokenizer)}, initializer_range=0.3)
    reward = RewardModel(AutoModelForCausalLM.from_config(config, attn_implementation="alignlab").eval())
    padded = padded_tokenizer(tokenizer)
    save_reward_model(reward, tmp_path, padded)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(model, padded, "right"), ours(reward), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(load_reward_model(str(tmp_path))), ours(reward), rtol=1e-5, atol=1e-5)


def test_a_head_under_an_adapter_is_refused(tokenizer: Any) -> None:
    """A live model's: a new adapter on it is refused for every trainer."""
    model = get_peft_model(new(DENSE, tokenizer), LoraConfig(r=2, target_modules=["q_proj", "lm_head"]))
    with pytest.raises(ConfigError, match="target_modules names the language-model head"):
        RewardModel(model)


def damaged(change: Callable[[dict[str, Any]], Any], folder: Path) -> str:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("base_model.model.score.weight"), "must be the adapter of a reward model"),
        (lambda t: t.update({"base_model.model.score.weight": torch.ones(2, 32)}), r"is \[2, 32\], .* \[1, 32\]"),
        (lambda t: t.pop(next(key for key in t if "lora_A" in key)), r"does not fit the model: missing \["),
        (lambda t: t.update({"base_model.model.model.x.lora_A.weight": torch.ones(1)}), "does not fit the model"),
    ],
)
def test_a_damaged_adapter_is_refused(change: Any, message: str, tokenizer: Any, tmp_path: Path) -> None:
    base = new(DENSE, tokenizer)
    save_reward_model(RewardModel(add_lora(base, LoraSettings(rank=2))), tmp_path / "a", tokenizer)
    with pytest.raises(CheckpointError, match=message):
        load_reward_model(damaged(change, tmp_path / "a"), base=new(DENSE, tokenizer))


def test_folders_of_other_models_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    base = new(DENSE, tokenizer)
    save_model(base, tmp_path / "lm")
    with pytest.raises(CheckpointError, match="must be a local folder of a reward model"):
        load_reward_model(str(tmp_path / "lm"))
    save_reward_model(RewardModel(add_lora(base, LoraSettings(rank=2))), tmp_path / "reward", tokenizer)
    with pytest.raises(CheckpointError, match="is a reward model, and a language model is needed here"):
        load_model(str(tmp_path / "reward"), dtype=torch.float32)
    save_model(add_lora(new(DENSE, tokenizer), LoraSettings(rank=2)), tmp_path / "policy")
    with pytest.raises(CheckpointError, match="and has task_type CAUSAL_LM"):
        load_reward_model(str(tmp_path / "policy"), base=new(DENSE, tokenizer))


def test_a_head_of_several_labels_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    save_reward_model(RewardModel(new(DENSE, tokenizer)), tmp_path, tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"score.weight": torch.ones(3, 32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is \[3, 32\], and a reward model's on this base is \[1, 32\]"):
        load_reward_model(str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForSequenceClassification"]
