"""A student of all layers is its teacher; a student of some layers is the teacher without the others."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from alignlab.errors import ConfigError
from alignlab.models.hub.checkpoints import load_model, new_model, save_model
from alignlab.models.layer_pruning import chosen_layers, evenly_spaced, student_from
from tests.models.attention_kinds import LATENT, PARTIAL, RECURRENT
from tests.models.test_parity import HUB

TOKENS = torch.arange(3, 21).view(2, 9)
SHAPE: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2,
    "initializer_range": 0.3,
}
MIXED = SHAPE | {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_shared_experts": 1,
    "mlp_layer_types": ["dense", "sparse", "dense", "sparse"], "router_bias_update_rate": 0.1, "sliding_window": 3,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "full_attention"],
}


LATENTS = SHAPE | LATENT | {
    "layer_types": ["latent_attention", "gated_attention", "latent_attention", "sliding_gated_attention"],
    "sliding_window": 3, "no_rope_layers": [1, 0, 0, 1], "attention_sinks": True, "rope_parameters": PARTIAL,
}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def random_model(architecture: dict[str, Any]) -> PreTrainedModel:
    torch.manual_seed(0)
    return new_model(architecture, vocab_size=32)


def without_others(theirs: PreTrainedModel, layers: list[int]) -> PreTrainedModel:
    """`transformers`' own model, whose list of layers is cut in place."""
    cut = copy.deepcopy(theirs)
    cut.model.layers = nn.ModuleList([cut.model.layers[i] for i in layers])
    cut.config.num_hidden_layers = len(layers)
    if getattr(cut.config, "layer_types", None):
        cut.config.layer_types = [cut.config.layer_types[i] for i in layers]
    return cut


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2], [1]])
@pytest.mark.parametrize("name", HUB)
def test_a_student_is_its_teacher_s_family_and_computes_its_layers(
    name: str, layers: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(HUB[name](), attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path / "hub")
    teacher = load_model(str(tmp_path / "hub"), dtype=torch.float32)
    student = student_from(teacher, layers)
    expected = logits(without_others(theirs, layers))
    torch.testing.assert_close(logits(student), expected)
    save_model(student, tmp_path / "student")
    dense = name == "qwen3-moe-mixed" and layers == [1]
    expected_type = "qwen3" if dense else theirs.config.model_type
    assert json.loads((tmp_path / "student/config.json").read_text())["model_type"] == expected_type
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "student", attn_implementation="eager")
    assert (type(plain) is type(theirs) or dense) and plain.config.num_hidden_layers == len(layers)
    torch.testing.assert_close(logits(plain), expected)
    torch.testing.assert_close(logits(load_model(str(tmp_path / "student"), dtype=torch.float32)), expected)


@pytest.mark.parametrize("architecture", [SHAPE, SHAPE | {"tie_word_embeddings": True}, MIXED, LATENTS])
def test_a_student_of_all_layers_is_its_teacher_exactly(architecture: dict[str, Any]) -> None:
    teacher = random_model(architecture)
    student = student_from(teacher, range(4))
    assert torch.equal(logits(student), logits(teacher))
    assert student.state_dict().keys() == teacher.state_dict().keys()


def test_a_student_has_its_own_weights_and_trains_all_of_them() -> None:
    teacher = random_model(SHAPE).requires_grad_(False)
    before = logits(teacher)
    student = student_from(teacher, [0, 3])
    assert all(p.requires_grad for p in student.parameters()) and not student.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1.0)
    assert torch.equal(logits(teacher), before)


def test_settings_of_a_layer_go_with_the_layer() -> None:
    student = student_from(random_model(MIXED), [1, 2])
    assert student.config.layer_types == ["sliding_attention", "full_attention"]
    assert student.config.sparse_layers == [0] and student.config.sliding_window == 3
    dense = student_from(random_model(MIXED), [0, 2])
    assert (dense.config.num_experts, dense.config.n_shared_experts, dense.config.sliding_window) == (0, 0, None)
    assert not [name for name, _ in dense.named_parameters() if "gate.weight" in name]


def test_a_tied_head_stays_tied_and_the_dtype_stays() -> None:
    student = student_from(random_model(SHAPE | {"tie_word_embeddings": True}).bfloat16(), [0])
    assert student.get_output_embeddings().weight is student.get_input_embeddings().weight
    assert student.dtype == torch.bfloat16
    assert student.model.rotary_embs["8"].inv_freq.dtype == torch.float32


def test_a_foreign_model_has_students_where_its_layers_are_one_list() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_embd=16, n_layer=3, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2)
    teacher = GPT2LMHeadModel(config).eval()
    assert torch.equal(logits(student_from(teacher, [0, 1, 2])), logits(teacher))
    cut = copy.deepcopy(teacher)
    cut.transformer.h = nn.ModuleList([cut.transformer.h[0], cut.transformer.h[2]])
    cut.config.n_layer = 2
    torch.testing.assert_close(logits(student_from(teacher, [0, 2])), logits(cut))


@pytest.mark.parametrize("layers", [[0, 2], [1, 2], [0, 1, 2]])
def test_a_foreign_mixture_has_students_of_dense_and_sparse_layers(layers: list[int]) -> None:
    torch.manual_seed(0)
    teacher = AutoModelForCausalLM.from_config(HUB["qwen3-moe-mixed"]()).eval()
    student = student_from(teacher, layers)
    assert student.config.mlp_only_layers == [i for i, layer in enumerate(layers) if layer == 1]
    torch.testing.assert_close(logits(student), logits(without_others(teacher, layers)))


def test_layers_that_cannot_be_found_or_chosen_are_refused() -> None:
    teacher = random_model(SHAPE)
    with pytest.raises(ConfigError, match="layers is empty"):
        student_from(teacher, [])
    with pytest.raises(ConfigError, match="layers holds 4, and must hold numbers from 0 to 3"):
        student_from(teacher, [0, 4])
    with pytest.raises(ConfigError, match=r"must ascend; use \[1, 2\]"):
        student_from(teacher, [2, 1, 2])
    with pytest.raises(ConfigError, match="num_layers is 5, and must be from 1 to the teacher's 4"):
        chosen_layers(teacher, None, 5)
    with pytest.raises(ConfigError, match="merge it"):
        student_from(get_peft_model(teacher, LoraConfig(target_modules=["q_proj"])), [0])
    hidden = random_model(SHAPE)
    hidden.model.layers = nn.Sequential(*hidden.model.layers)
    with pytest.raises(ConfigError, match="has 0 lists of 4 layers"):
        student_from(hidden, [0])


@pytest.mark.parametrize(
    ("num_layers", "count", "expected"),
    [(5, 3, (0, 2, 4)), (4, 4, (0, 1, 2, 3)), (6, 3, (0, 3, 5)), (30, 2, (0, 29)), (7, 1, (0,)), (4, 3, (0, 2, 3))],
)
def test_evenly_spaced_layers_keep_both_ends(num_layers: int, count: int, expected: tuple[int, ...]) -> None:
    assert evenly_spaced(num_layers, count) == expected
    assert all(len(set(evenly_spaced(num_layers, n))) == n for n in range(1, num_layers + 1))


@pytest.mark.parametrize("layers", [[0], [1], [0, 2], [1, 3], [2, 3]])
def test_fields_of_kinds_that_are_left_out_go_with_them(layers: list[int]) -> None:
    teacher: Any = random_model(LATENTS)
    student: Any = student_from(teacher, layers)
    kinds = student.config.layer_types
    assert (student.config.kv_lora_rank is not None) == ("latent_attention" in kinds)
    assert (student.config.sliding_window is not None) == ("sliding_gated_attention" in kinds)
    assert student.config.no_rope_layers == [teacher.config.no_rope_layers[index] for index in layers]
    teacher.model.layers = nn.ModuleList([teacher.model.layers[index] for index in layers])
    teacher.config.layer_types, teacher.config.num_hidden_layers = kinds, len(layers)
    assert torch.equal(logits(student), logits(teacher))


def test_a_student_of_recurrent_layers_alone_has_no_settings_of_attention(tmp_path: Path) -> None:
    hybrid = SHAPE | RECURRENT | {
        "layer_types": ["gated_deltanet"] * 3 + ["full_attention"], "attention_sinks": True, "use_qk_norm": True,
        "qk_norm_scope": "all_heads", "attn_logit_softcapping": 5.0, "attention_bias": True,
    }
    student = student_from(random_model(hybrid), [0, 2])
    save_model(student, tmp_path / "student")
    again = load_model(str(tmp_path / "student"), dtype=torch.float32)
    torch.testing.assert_close(logits(again), logits(student), rtol=0, atol=0)
    assert not (again.config.attention_sinks or again.config.use_qk_norm or again.config.attention_bias)
