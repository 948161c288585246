"""Adapters on stacked experts against a twin whose weights hold the adapter's terms."""

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import VLLMSettings
from alignlab.errors import ConfigError
from alignlab.models.adapters import adapters_disabled, add_lora, add_role, in_role
from alignlab.models.config import PolicyConfig
from alignlab.models.expert_adapters import GroupedExperts
from alignlab.models.hub.checkpoints import load_model, save_model
from alignlab.models.merging import merged_state
from alignlab.models.moe import Experts
from alignlab.models.policy import Policy
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.vllm.options import checked_adapter_rank, sync_adapter_only
from tests.models.conftest import SIZES

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LORA = LoraSettings(rank=3, alpha=6, experts=True)
TOKENS = torch.tensor([[3, 9, 4, 7, 22, 5]])


def make_model() -> PolicyForCausalLM:
    torch.manual_seed(0)
    return PolicyForCausalLM(PolicyConfig(**SIZES, **MOE, initializer_range=0.2)).eval()


def shake(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def experts_of(model: torch.nn.Module) -> list[Experts]:
    return [module for module in model.modules() if isinstance(module, Experts)]


def test_experts_are_adapted_beside_the_linear_layers():
    model = add_lora(make_model(), LORA)
    names = [name.partition(".lora_")[0] for name, _ in model.named_parameters() if "lora_" in name]
    adapted = {name.rpartition(".")[2] for name in names}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "experts", "base_layer"}
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())
    trained = [p for p in add_lora(make_model().bfloat16(), LORA).parameters() if p.requires_grad]
    assert trained and all(p.dtype == torch.float32 for p in trained)


@pytest.mark.parametrize("rank", [3, 8])
def test_gradients_are_those_of_dense_experts_with_the_terms_added(rank):
    """dL/dA and dL/dB follow from dL/dW of a twin that holds W + scale * B A for each expert."""
    model = shake(add_lora(make_model(), LoraSettings(rank=rank, alpha=6, experts=True, target_modules=())))
    assert any(isinstance(module, GroupedExperts) for module in model.modules())
    twin = make_model()
    twin.load_state_dict(merged_state(model))
    twin.train(), model.train()
    weights = torch.randn(1, 6, SIZES["vocab_size"], generator=torch.Generator().manual_seed(1))
    for each in (model, twin):
        (each(TOKENS).logits * weights).sum().backward()
    torch.testing.assert_close(logits(model.eval()), logits(twin.eval()), rtol=1e-4, atol=1e-5)
    wrappers = [module for module in model.modules() if isinstance(module, GroupedExperts)]
    outer = [wrapper for wrapper in wrappers if not any(wrapper is other.base_layer for other in wrappers)]
    for wrapper, plain in zip(outer, experts_of(twin), strict=True):
        for layer in (wrapper, wrapper.base_layer):
            name, size = layer.parameter_name, 4
            dense, scale = plain.get_parameter(name).grad, 6 / rank
            down = layer.lora_A["default"].weight.reshape(size, rank, -1)
            up = layer.lora_B["default"].weight.reshape(-1, rank, size).permute(2, 0, 1)
            grad_down = layer.lora_A["default"].weight.grad.reshape(size, rank, -1)
            grad_up = layer.lora_B["default"].weight.grad.reshape(-1, rank, size).permute(2, 0, 1)
            torch.testing.assert_close(grad_down, scale * up.transpose(1, 2) @ dense, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(grad_up, scale * dense @ down.transpose(1, 2), rtol=1e-3, atol=1e-4)


def test_grouped_products_equal_peft_s_own_sum():
    ours = shake(add_lora(make_model(), LORA))
    config = LoraConfig(
        r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM",
        target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"],
    )
    twin = shake(get_peft_model(make_model(), config))
    torch.testing.assert_close(logits(ours), logits(twin), rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(ours), logits(twin)), "under autocast, PEFT's own way is taken"


def test_disabled_adapters_leave_the_base_exactly():
    before = logits(make_model())
    model = shake(add_lora(make_model(), LORA))
    adapted = logits(model)
    with adapters_disabled(model):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), adapted) and not torch.allclose(adapted, before, atol=1e-3)


def test_packed_log_probs_are_those_of_the_model(pack, tokens):
    model = shake(add_lora(make_model(), LORA))
    mask = pack.predecessors >= 0
    replayed = Policy(model)(tokens, pack, mask)
    again = Policy(model)(tokens, pack, mask, routing=replayed.routing)
    torch.testing.assert_close(replayed.logprobs, again.logprobs)
    row = tokens[5:8]
    wanted = F.log_softmax(model(torch.cat([tokens[:5], row])[None]).logits[0], -1)
    torch.testing.assert_close(replayed.logprobs[5:8], wanted[4:7].gather(1, row[:, None])[:, 0], rtol=1e-4, atol=1e-4)


def test_a_role_adapts_the_experts_on_its_own():
    model = shake(add_lora(make_model(), LORA))
    policy = logits(model)
    add_role(model, "critic", rank=2, alpha=4)
    with in_role(model, "critic"):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trained and all(".critic." in name for name in trained)
        torch.testing.assert_close(logits(model), logits(make_model()))
    assert torch.equal(logits(model), policy)


def test_saved_adapter_loads_here_and_in_plain_peft(tmp_path):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(**SIZES, **MOE, mlp_only_layers=[], decoder_sparse_step=1, initializer_range=0.2)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "base")
    model = shake(add_lora(load_model(str(tmp_path / "base"), dtype=torch.float32), LORA))
    assert isinstance(model.get_base_model(), PolicyForCausalLM)
    save_model(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_model(str(tmp_path / "adapter"), dtype=torch.float32)), logits(model))
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(plain.eval()), logits(model), rtol=1e-4, atol=1e-4)


def test_all_linear_on_a_mixture_warns_that_experts_are_left_out(caplog):
    with caplog.at_level(logging.WARNING, logger="alignlab"):
        add_lora(make_model(), LoraSettings())
        assert "experts of this mixture, 66 % of its weights" in caplog.text and "lora.experts" in caplog.text
        caplog.clear()
        add_lora(make_model(), LORA)
        add_lora(make_model(), LoraSettings(target_modules=("q_proj",)))
        add_lora(PolicyForCausalLM(PolicyConfig(**SIZES)), LoraSettings())
    assert not caplog.records


@pytest.mark.parametrize("name", ["gate_up_proj", "gate_proj", "w1"])
def test_names_of_expert_layers_are_refused_with_the_setting(name):
    with pytest.raises(ConfigError, match=rf"names {name}, .* stacked parameters .*lora.experts"):
        add_lora(make_model(), LoraSettings(target_modules=("q_proj", name)))


def test_experts_of_a_dense_model_are_refused():
    with pytest.raises(ConfigError, match=r"lora.experts is true, and PolicyForCausalLM has no stacked experts"):
        add_lora(PolicyForCausalLM(PolicyConfig(**SIZES)), LORA)


@pytest.mark.parametrize("settings", [{"experts": True, "dropout": 0.1}, {"target_modules": ()}])
def test_incompatible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match=r"dropout is 0.1|target_modules is"):
        LoraSettings(**settings)


def test_experts_of_another_class_are_adapted_by_peft():
    torch.manual_seed(0)
    sizes = {name: size for name, size in SIZES.items() if name != "head_dim"}
    model = OlmoeForCausalLM(OlmoeConfig(**sizes, num_experts=4, num_experts_per_tok=2)).eval()
    before = logits(model)
    adapted = shake(add_lora(model, LoraSettings(rank=3, experts=True, target_modules=("q_proj",))))
    live = logits(adapted)
    assert not torch.allclose(live, before, atol=1e-3)
    twin = OlmoeForCausalLM(model.config).eval()
    twin.load_state_dict(merged_state(adapted))
    torch.testing.assert_close(logits(twin), live, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_experts_is_synced_merged():
    settings = VLLMSettings(engine="vllm")
    assert not sync_adapter_only(settings, add_lora(make_model(), LORA), on_cpu=False)
    assert sync_adapter_only(settings, add_lora(make_model(), LoraSettings()), on_cpu=False)
    with pytest.raises(ConfigError, match=r"more than plain LoRA .* in model.layers.0.mlp.experts; use rollout.sync"):
        checked_adapter_rank(add_lora(make_model(), LORA))
