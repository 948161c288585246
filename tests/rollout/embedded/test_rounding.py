"""The embedded engine on rounded weights, by torch's own products: against a model whose weights were rounded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import RolloutSettings, rounded_weights
from alignlab.errors import ConfigError
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.merging import merge_adapter
from alignlab.models.weight_rounding import row_codes, to_codes, weight_scales
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.rounded_linear import rounded_linear
from alignlab.rollout.embedded.rounding import make_rounding
from alignlab.rollout.memory import engine_bytes
from alignlab.types import SamplingParams
from tests.models.rounded_models import rounded_model
from tests.rollout.conftest import SIZES, VOCAB, MakeEngine, full_logprobs, make_prompts
from tests.rollout.embedded.test_weights import adapted

SAMPLING = SamplingParams(n=2, max_new_tokens=6, ignore_eos=True, seed=3)
PROMPTS = make_prompts(5, 9)
SHAPE = SIZES | {"intermediate_size": 64, "attention_bias": True}
MIXTURE = SHAPE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "int8": {"type": "int8"}, "int8, head too": {"type": "int8", "exact": []},
    "int4": {"type": "int4", "exact": []},  # the head has 260 outputs, which torch packs by 16
    "int4 but for down": {"type": "int4", "exact": ["lm_head", "down_proj", "layers.1"]},
}


def model_of(**changes: Any) -> PreTrainedModel:
    torch.manual_seed(5)
    return new_model(SHAPE | changes, vocab_size=VOCAB).eval()


def gap(engine: EmbeddedEngine, model: PreTrainedModel) -> float:
    """The largest distance of an engine's log-probs from a model's full passes."""
    largest = 0.0
    for rollout in engine.generate(PROMPTS, SAMPLING):
        for completion in rollout.completions:
            ids = [*rollout.prompt.token_ids, *completion.token_ids]
            expected = full_logprobs(model, ids)[len(rollout.prompt.token_ids) - 1 : -1]
            chosen = expected[torch.arange(len(completion.token_ids)), list(completion.token_ids)]
            largest = max(largest, float((chosen - torch.tensor(completion.raw_logprobs)).abs().max()))
    return largest


@pytest.mark.parametrize("kind", KINDS)
def test_the_engine_samples_from_the_rounded_model(kind: str, make_engine: MakeEngine) -> None:
    model = model_of()
    engine = make_engine(model, quantization=KINDS[kind])
    settings = RolloutSettings.model_validate({"quantization": KINDS[kind]})
    assert gap(engine, rounded_model(model, settings)) < 1e-5
    assert gap(engine, model) > 1e-3
    assert engine.metrics()["engine/rounding_s"] > 0


def test_dynamic_rounding_rounds_the_rows_of_each_product(make_engine: MakeEngine) -> None:
    # In float64: in float32 an activation near the middle of two codes is rounded up by one and down by the other.
    model = model_of().double()
    engine = make_engine(model, quantization="int8_dynamic")
    twin = rounded_model(model, RolloutSettings.model_validate({"quantization": "int8_dynamic"}))
    assert gap(engine, twin) > 1e-3

    def round_rows(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        codes, scales = row_codes(inputs[0].flatten(0, -2))
        return ((codes * scales).view_as(inputs[0]),)

    for layer in twin.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(round_rows)
    assert gap(engine, twin) < 2e-6  # log-probs are reported in float32


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_each_update_rounds_the_merged_weights_anew(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    settings = RolloutSettings.model_validate({"quantization": kind})
    policy = adapted(model_of()).eval()
    engine = EmbeddedEngine(policy, tokenizer, settings)
    twin = rounded_model(merge_adapter(copy.deepcopy(policy)), settings)
    assert gap(engine, twin) < 1e-5
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.mul_(-1)
    engine.update_weights(1)
    updated = rounded_model(merge_adapter(copy.deepcopy(policy)), settings)
    assert gap(engine, updated) < 1e-5 and gap(engine, twin) > 1e-2


def test_the_policy_itself_is_never_rounded(make_engine: MakeEngine) -> None:
    model = model_of()
    before = copy.deepcopy(model.state_dict())
    make_engine(model, quantization="int8").generate(PROMPTS, SAMPLING)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ({}, {"quantization": {"type": "int4", "group": 64}}, r"group is 64, and must divide .*q_proj has 32"),
        ({}, {"quantization": {"type": "int8", "exact": ["haed"]}}, "'haed', and must have parts.*lm_head.*q_proj"),
        ({}, {"quantization": {"type": "int8", "exact": ["lm_head", "layers"]}}, "leaves every layer as it is"),
        (MIXTURE, {"quantization": "int8"}, "by the native step alone, but .*float32.*exact: .lm_head, experts"),
    ],
)
def test_what_cannot_be_rounded_is_refused_by_name(
    shape: dict[str, Any], settings: dict[str, Any], message: str, make_engine: MakeEngine
) -> None:
    with pytest.raises(ConfigError, match=message):
        make_engine(model_of(**shape), **settings)


def test_a_mixture_with_exact_experts_has_its_other_layers_rounded(make_engine: MakeEngine) -> None:
    model = model_of(**MIXTURE)
    settings = {"type": "int8", "exact": ["lm_head", "experts"]}
    twin = rounded_model(model, RolloutSettings.model_validate({"quantization": settings}))
    assert gap(make_engine(model, quantization=settings), twin) < 1e-5


def test_models_of_transformers_and_devices_without_products_are_refused(
    make_engine: MakeEngine, llama: PreTrainedModel
) -> None:
    with pytest.raises(ConfigError, match="LlamaForCausalLM may read a layer's weight by itself"):
        make_engine(llama, quantization="int8")
    settings = RolloutSettings.model_validate({"quantization": "int8"})
    with pytest.raises(ConfigError, match=r"must be null on a GPU.*rollout.engine: vllm with quantization: fp8"):
        make_rounding(model_of(), settings, torch.device("cuda"))


def test_predicted_memory_has_codes_and_scales() -> None:
    model, device = model_of(), torch.device("cpu")
    sizes = {"num_sequences": 1, "num_tokens": 8}
    plain = engine_bytes(model, RolloutSettings(), device, **sizes)
    layer = 4 * (32 * 32 * 2 + 32 * 16 * 2) // 4 + 3 * 32 * 64  # numbers of q, o, k and v, and of the feed-forward
    outputs = 32 * 3 + 16 * 2 + 64 * 2
    settings = RolloutSettings.model_validate({"quantization": "int8"})
    assert engine_bytes(model, settings, device, **sizes) - plain == 2 * (layer + 4 * outputs)
    rounding = rounded_weights(settings)
    assert rounding is not None and rounding.exact == ("lm_head",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["int8", "int8_dynamic"])
@pytest.mark.parametrize("inputs", [1, 6, 33, 40, 48])
def test_products_of_any_number_of_inputs_are_those_of_the_rounded_weight(
    inputs: int, kind: str, dtype: torch.dtype
) -> None:
    """Torch's product of 8 bits in bfloat16 reads beyond a row whose length is no multiple of 16."""
    torch.manual_seed(inputs)
    layer, rows = nn.Linear(inputs, 24).to(dtype), torch.randn(5, inputs).to(dtype)
    model = model_of()
    rounding = make_rounding(model, RolloutSettings.model_validate({"quantization": kind}), torch.device("cpu"))
    assert rounding is not None
    scales = weight_scales(layer.weight.detach(), 8)
    weight = to_codes(layer.weight.detach(), scales, 8).double() * scales.double()
    expected = rows.double() @ weight.T + layer.bias.double()
    product = rounded_linear(layer, rounding)(rows)
    assert (product.double() - expected).norm() < 0.03 * expected.norm()
