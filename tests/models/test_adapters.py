"""LoRA in the base's dtype against PEFT's own layers."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from alignlab.config.model import LoraSettings
from alignlab.config.trainers import SFTConfig
from alignlab.errors import ConfigError
from alignlab.functional import products
from alignlab.loop.optim import make_optimizer
from alignlab.models import lora_layers
from alignlab.models.adapters import (
    ComputeDtypeLinear,
    adapters_disabled,
    add_lora,
    compute_in_base_dtype,
    has_adapters,
)
from alignlab.models.lora_layers import keep_casts
from tests.models.conftest import SIZES

TOKENS = torch.tensor([[3, 9, 4, 7, 22, 5]])


@pytest.fixture
def base() -> LlamaForCausalLM:
    """A model with biases, whose values an adapter must leave as they are."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    return model


def randomise(model: PeftModel) -> PeftModel:
    """Give the adapter random weights: it starts with lora_B at zero, where it does nothing."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model


def stock(base: LlamaForCausalLM, **options) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return randomise(get_peft_model(copy.deepcopy(base), config)).eval()


def ours(base: LlamaForCausalLM, **options) -> PeftModel:
    return randomise(add_lora(copy.deepcopy(base), LoraSettings(rank=4, alpha=6, **options))).eval()


def run(model: PeftModel) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """(logits, gradient of the embeddings' output, gradients of the adapter)."""
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits.dtype)
    (logits * weights).sum().backward()
    return logits, embedded.grad, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def _flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def test_equals_peft_in_float32(base):
    model = ours(base)
    assert sum(isinstance(m, ComputeDtypeLinear) for m in model.modules()) == 14
    assert all(m._plain_adapter(torch.zeros(1)) for m in model.modules() if isinstance(m, ComputeDtypeLinear))
    (logits, grad_x, grads), (logits_twin, grad_x_twin, grads_twin) = run(model), run(stock(base))
    torch.testing.assert_close(logits, logits_twin)
    torch.testing.assert_close(grad_x, grad_x_twin)
    assert grads.keys() == grads_twin.keys() and all("lora_" in name for name in grads)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, grads_twin[name], rtol=1e-4, atol=1e-5)


def test_bfloat16_base_has_float32_adapters_and_gradients(base):
    model, twin = ours(base.bfloat16()), stock(base.bfloat16())
    (logits, _, grads), (logits_twin, _, grads_twin) = run(model), run(twin)
    assert logits.dtype == torch.bfloat16
    assert (logits - logits_twin).norm() < 0.02 * logits_twin.norm()
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    flat, flat_twin = _flat(grads), _flat(grads_twin)
    assert (flat - flat_twin).norm() < 0.02 * flat_twin.norm()


@pytest.mark.parametrize("fast", [True, False])
def test_bfloat16_is_as_near_to_exact_products_whichever_way_a_processor_multiplies(base, fast, monkeypatch):
    monkeypatch.setattr(products, "has_fast_bfloat16", lambda: fast)
    monkeypatch.setattr(products, "LEAST_ROWS", 1)
    model = ours(base.bfloat16())
    runs = run(model), run(copy.deepcopy(model).double())
    results = [(logits, grad_x, _flat(grads)) for logits, grad_x, grads in runs]
    assert [found.dtype for found in results[0]] == [torch.bfloat16, torch.bfloat16, torch.float32]
    for found, twin in zip(*results, strict=True):
        assert (found.double() - twin).norm() < 0.03 * twin.norm()


def test_dropout_is_computed_by_peft(base):
    model, twin = ours(base, dropout=0.5).train(), stock(base, lora_dropout=0.5).train()
    outputs = []
    for each in (model, twin):
        torch.manual_seed(3)
        outputs.append(each(TOKENS).logits)
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], model.eval()(TOKENS).logits)


def test_disabled_adapters_leave_the_base_exactly(base):
    before = base(TOKENS).logits
    model = ours(base)
    adapted = model(TOKENS).logits
    with adapters_disabled(model):
        assert torch.equal(model(TOKENS).logits, before)
    assert torch.equal(model(TOKENS).logits, adapted) and not torch.equal(adapted, before)
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_a_fresh_adapter_changes_nothing(base):
    torch.testing.assert_close(add_lora(copy.deepcopy(base), LoraSettings())(TOKENS).logits, base(TOKENS).logits)


def test_saved_adapter_loads_in_plain_peft(base, tmp_path):
    model = ours(base)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert any(type(m) is LoraLinear for m in loaded.modules())
    assert not any(isinstance(m, ComputeDtypeLinear) for m in loaded.modules())
    torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)
    assert torch.equal(compute_in_base_dtype(loaded)(TOKENS).logits, model(TOKENS).logits)


def test_all_linear_leaves_the_head_alone(base):
    untied = LlamaForCausalLM(LlamaConfig(**SIZES))
    for model in (base, untied):
        adapted = {n for n, m in add_lora(model, LoraSettings()).named_modules() if isinstance(m, LoraLinear)}
        assert adapted and not any("lm_head" in name for name in adapted)


@pytest.mark.parametrize("targets", [("q_proj", "qproj"), ".*no_such"])
@pytest.mark.parametrize("settings", [LoraSettings, lambda target_modules: LoraConfig(target_modules=target_modules)])
def test_unknown_target_modules_are_named(base, targets, settings):
    with pytest.raises(ConfigError, match=r"(qproj|no_such), and no layer .* down_proj, embed_tokens, gate_proj"):
        add_lora(base, settings(target_modules=targets))


def test_target_modules_choose_the_layers(base):
    model = add_lora(base, LoraSettings(target_modules=("q_proj", "v_proj")))
    names = {name.rsplit(".", 1)[-1] for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert names == {"q_proj", "v_proj"}


def test_variants_of_lora_are_computed_by_peft(base):
    config = {"r": 2, "target_modules": ["q_proj", "up_proj"], "use_dora": True}
    model, twin = randomise(add_lora(copy.deepcopy(base), LoraConfig(**config))), copy.deepcopy(base)
    twin = randomise(get_peft_model(twin, LoraConfig(**config)))
    assert torch.equal(model(TOKENS).logits, twin(TOKENS).logits)


def test_autocast_is_computed_by_peft(base):
    policy = add_lora(base, LoraSettings(rank=4))
    with torch.autocast("cpu", torch.bfloat16):
        logits = policy(torch.tensor([[1, 2, 3]])).logits
    logits.float().sum().backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_has_adapters(base):
    assert not has_adapters(base)
    assert has_adapters(ours(base))


def num_casts(work, model: PeftModel) -> int:
    """How often an adapter's matrix is cast to another dtype."""
    sources = {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    storages = {parameter.data_ptr() for parameter in model.parameters() if id(parameter) in sources}

    class Counting(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Counting.count += func is torch.ops.aten._to_copy.default and args[0].data_ptr() in storages
            return func(*args, **(kwargs or {}))

    with Counting():
        work()
    return Counting.count


def test_matrices_are_cast_once_an_update_and_never_stale(base: LlamaForCausalLM) -> None:
    kept, cast = (randomise(add_lora(copy.deepcopy(base).bfloat16(), LoraSettings(rank=4))) for _ in range(2))
    keep_casts(kept)
    with torch.inference_mode():  # rollouts come first
        assert torch.equal(kept(TOKENS).logits, cast(TOKENS).logits)
    layers = sum(isinstance(module, ComputeDtypeLinear) for module in kept.modules())
    for step in range(3):
        assert num_casts(lambda: run(kept), kept) == (2 * layers if step else 0)
        assert num_casts(lambda: run(kept), kept) == 0 < num_casts(lambda: run(cast), cast)
        for model in (kept, cast):
            model.zero_grad(set_to_none=True)
        results = [run(model) for model in (kept, cast)]
        assert torch.equal(results[0][0], results[1][0])
        for name, gradient in results[0][2].items():
            assert torch.equal(gradient, results[1][2][name]) and gradient.dtype == torch.float32, name
        for model in (kept, cast):
            make_optimizer(model, SFTConfig(optim={"learning_rate": 0.1})).step()
    for model in (kept, cast):
        randomise(model)  # by new tensors in the same parameters
    assert torch.equal(kept(TOKENS).logits, cast(TOKENS).logits)


def test_sharded_matrices_are_cast_in_every_pass(base: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add_lora(copy.deepcopy(base).bfloat16(), LoraSettings(rank=4))
    monkeypatch.setattr(lora_layers, "piece_of", lambda parameter: parameter)
    keep_casts(model)
    assert num_casts(lambda: (run(model), run(model)), model) >= 4
