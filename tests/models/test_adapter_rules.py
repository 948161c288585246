"""Forms of adapters, and states of live models, that are refused."""

import logging

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from alignlab.config.model import LoraSettings
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import ConfigError
from alignlab.loop.inputs import resolve_model
from alignlab.loop.reference import frozen_copy
from alignlab.models.adapter_rules import check_base_is_reference, check_trainable
from alignlab.models.adapters import adapters_disabled, add_lora, add_role, in_role, is_of_adapter, load_role
from alignlab.models.policy import Policy
from tests.models.conftest import SIZES

TOKENS = torch.tensor([[3, 9, 4, 7, 22, 5]])
CPU = torch.device("cpu")


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True)).eval()


def config(**options) -> LoraConfig:
    return LoraConfig(**{"task_type": "CAUSAL_LM", "r": 4, "target_modules": ["q_proj"], **options})


REFUSED = {
    "bias is 'all'": {"bias": "all"},
    "bias is 'lora_only'": {"bias": "lora_only"},
    "task_type is SEQ_CLS": {"task_type": "SEQ_CLS"},
    "layer_replication is set": {"layer_replication": [(0, 1), (0, 2)]},
    "alora_invocation_tokens is set": {"alora_invocation_tokens": [3]},
    "init_lora_weights is 'pissa_niter_4'": {"init_lora_weights": "pissa_niter_4"},
    "init_lora_weights is 'lora_ga'": {"init_lora_weights": "lora_ga"},
    r"output head \(lm_head\), which must be frozen": {"target_modules": ["q_proj", "lm_head"]},
    "lora_bias is set, and .*gate_proj has no bias": {"target_modules": ["gate_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_adapter_forms_that_cannot_be_merged_exactly_are_refused(base, message):
    with pytest.raises(ConfigError, match=message):
        add_lora(base, config(**REFUSED[message]))


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_initialisations_that_leave_the_base_unchanged_are_accepted(base, start):
    before = base(TOKENS).logits
    model = add_lora(base, config(init_lora_weights=start))
    check_base_is_reference(model)
    with adapters_disabled(model):
        assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_initialisations_that_change_the_base_are_refused_where_it_is_the_reference(base, start):
    before = base(TOKENS).logits
    model = add_lora(base, config(init_lora_weights=start))
    torch.testing.assert_close(model(TOKENS).logits, before, rtol=1e-4, atol=1e-4)
    for use in (
        lambda: frozen_copy(Policy(model)),
        lambda: load_role(model, "reward", config(), {}),
        lambda: adapters_disabled(model).__enter__(),
    ):
        with pytest.raises(ConfigError, match=f"init_lora_weights is '{start}', which moves a part of the base"):
            use()


@pytest.mark.parametrize(
    "other",
    [
        IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
        AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10),
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
    ids=lambda each: each.peft_type.value,
)
def test_other_kinds_of_adapters_are_refused(base, other):
    with pytest.raises(ConfigError, match=rf"of PEFT's type {other.peft_type.value}"):
        check_trainable(get_peft_model(base, other))
    with pytest.raises(ConfigError, match=rf"of PEFT's type {other.peft_type.value}, and must be LORA"):
        add_lora(base, other)


def scaled(model: PeftModel) -> None:
    model.get_base_model().model.layers[1].self_attn.q_proj.set_scale("default", 3)


def doubled(model: PeftModel) -> None:
    model.add_adapter("other", config())
    model.base_model.set_adapter(["default", "other"])


def trains_norms(model: PeftModel) -> None:
    model.get_base_model().model.norm.requires_grad_(True)


STATES = {
    r"model.norm.weight \(1 weights in all\) is in training and belongs to the base": trains_norms,
    "q_proj is scaled by 6, and must be by alpha / rank = 2": scaled,
    "adapters default, other are in use at once": doubled,
    "q_proj is merged into its base; call model.unmerge_adapter": lambda model: model.merge_adapter(),
    "is switched off, so nothing would train": lambda model: model.disable_adapter_layers(),
}


@pytest.mark.parametrize("message", STATES)
def test_a_live_adapter_in_a_state_that_its_folder_does_not_keep_is_refused(base, message):
    model = get_peft_model(base, config())
    check_trainable(model)
    STATES[message](model)
    with pytest.raises(ConfigError, match=message):
        resolve_model(model, train_tokenizer(["ab"], vocab_size=262), None, CPU)


def test_rslora_and_rank_patterns_are_not_taken_for_a_manual_scale(base):
    check_trainable(get_peft_model(base, config(use_rslora=True, target_modules=["q_proj", "v_proj"],
                                                rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 5})))


def test_an_adapter_that_peft_cannot_make_is_a_named_error(base):
    with pytest.raises(ConfigError, match=r"PEFT cannot put this adapter on LlamaForCausalLM: .*even"):
        add_lora(base, config(r=3, init_lora_weights="orthogonal"))


def test_unknown_target_parameters_are_named(base):
    with pytest.raises(ConfigError, match=r"target_parameters names mlp.no_such, and no parameter of Llama"):
        add_lora(base, config(target_parameters=["q_proj.weight", "mlp.no_such"]))


def test_a_role_leaves_modules_to_save_to_the_policy(base, caplog):
    options = {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}
    model = add_lora(base, config(**options))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    with caplog.at_level(logging.WARNING):
        add_role(model, "critic", rank=2, alpha=4)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    with in_role(model, "critic"):
        inside = {name for name, p in model.named_parameters() if p.requires_grad}
    assert inside and all("lora" in name and "critic" in name for name in inside)
    assert any("lora_embedding_A.critic" in name for name in inside), "the embeddings' matrices are named otherwise"
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert all(is_of_adapter(model, name) for name in trained | inside)


def test_settings_make_the_config_that_peft_gets(base):
    made = add_lora(base, LoraSettings(rank=3, target_modules="q_proj")).peft_config["default"]
    assert (made.r, made.target_modules, made.target_parameters) == (3, {"q_proj"}, None)
