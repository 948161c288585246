"""Products and steps of the kernels with rounded weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import RolloutSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.weight_rounding import BITS, from_codes, row_codes, to_codes, weight_scales
from alignlab.native.processor import INTEGER_PRODUCTS, processor_flags
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.native.binding import kernels_of
from alignlab.rollout.embedded.native.packing import Packer
from alignlab.rollout.embedded.native.runner import NativeRunner
from alignlab.rollout.embedded.native.weights import NativeWeights
from alignlab.rollout.embedded.rounding import Rounding
from alignlab.rollout.memory import engine_bytes
from alignlab.types import SamplingParams
from tests.models.rounded_models import rounded_model
from tests.rollout.conftest import SIZES, VOCAB, flat, make_prompts
from tests.rollout.embedded.native.conftest import MIXTURE, model_of, needs_bfloat16, needs_kernels
from tests.rollout.embedded.native.test_native_step import as_sampled
from tests.rollout.embedded.test_weights import adapted

pytestmark = [
    needs_kernels,
    pytest.mark.skipif(INTEGER_PRODUCTS not in processor_flags(), reason="needs AVX-512 VNNI"),
]
KINDS = ("int8", "int4", "int8_dynamic")
SAMPLING = SamplingParams(n=2, max_new_tokens=6, seed=4, ignore_eos=True)
PROMPTS = make_prompts(3, 14)
DTYPES = [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
BY_32: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
MIXED: dict[str, Any] = {
    **MIXTURE, **BY_32, "moe_intermediate_size": 32, "n_shared_experts": 1, "shared_expert_gate": True,
    "shared_expert_intermediate_size": 32, "mlp_layer_types": ["dense", "sparse"],
}  # fmt: skip


def rounding_of(kind: str) -> Rounding:
    settings = RolloutSettings.model_validate({"quantization": kind}).quantization
    assert settings is not None
    return Rounding(settings, frozenset())


def sixteen_bits(rows: Tensor) -> Tensor:
    """Rows [N,I] in 16 bits with a scale each, float64: what weights of 8 or 4 bits alone are multiplied with."""
    scales = rows.double().abs().amax(-1, keepdim=True) / 32767
    return (rows.double() / scales.clamp_min(1e-300)).round() * scales


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [32, 608, 1120])  # one block of 512 inputs, two, and three
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_the_codes(kind: str, size: int, dtype: torch.dtype) -> None:
    kernels, rounding = kernels_of(dtype), rounding_of(kind)
    torch.manual_seed(size)
    weights = [torch.randn(n, size).to(dtype) for n in (70, 5)]
    bias = [torch.randn(n) for n in (70, 5)]
    joined = torch.cat(weights)
    scales = weight_scales(joined, BITS[kind], rounding.group)
    rounded = from_codes(to_codes(joined, scales, BITS[kind]), scales)
    packed = Packer(kernels, lambda module: module, rounding).stacked(weights, bias, rounded=True)
    for num_rows in (1, 3, 13, 97):
        rows = torch.randn(num_rows, size).to(dtype)
        rows[0, 5], rows[-1] = 9, 0 if num_rows > 1 else 1
        codes, steps = row_codes(rows)
        taken = codes.double() * steps.double() if kind == "int8_dynamic" else sixteen_bits(rows)
        expected = taken @ rounded.double().T + torch.cat(bias).double()
        found = kernels.product(rows, packed).double()
        torch.testing.assert_close(found, expected, atol=2e-6 * size, rtol=2e-6)
        alone = kernels.product(rows[:1].contiguous(), packed)
        assert torch.equal(alone, kernels.product(rows, packed)[:1])  # whatever the rows beside it


@pytest.mark.parametrize("kind", ["int8", "int8_dynamic"])
@pytest.mark.parametrize("size", [1, 31, 38])
def test_sizes_that_fill_no_word_are_filled_with_zeros(size: int, kind: str) -> None:
    kernels, rounding = kernels_of(torch.float32), rounding_of(kind)
    torch.manual_seed(size)
    weight, rows = torch.randn(33, size), torch.randn(4, size)
    packed = Packer(kernels, lambda module: module, rounding).stacked([weight], rounded=True)
    scales = weight_scales(weight, 8)
    exact = rows.double() @ from_codes(to_codes(weight, scales, 8), scales).double().T
    tolerance = 0.02 if kind == "int8_dynamic" else 1e-4
    assert (kernels.product(rows, packed) - exact).norm() <= tolerance * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_numbers_do_not_overflow(kind: str) -> None:
    weight, rows = torch.full((1, 4096), -3.0), torch.full((2, 4096), 5.0)
    rows[1] = -5
    packed = Packer(kernels_of(torch.float32), lambda m: m, rounding_of(kind)).stacked([weight], rounded=True)
    scales = weight_scales(weight, BITS[kind], rounding_of(kind).group)
    value = 5 * float(from_codes(to_codes(weight, scales, BITS[kind]), scales).sum())
    expected = torch.tensor([[value], [-value]])
    torch.testing.assert_close(kernels_of(torch.float32).product(rows, packed), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_have_no_numbers_as_results(wrong: float) -> None:
    kernels = kernels_of(torch.float32)
    packed = Packer(kernels, lambda m: m, rounding_of("int8")).stacked([torch.ones(2, 40)], rounded=True)
    rows = torch.ones(2, 40)
    rows[0, 33] = wrong
    assert kernels.product(rows, packed).isnan().tolist() == [[True, True], [False, False]]


def native_engine(model: Any, tokenizer: PreTrainedTokenizerFast, kind: Any, **settings: Any) -> EmbeddedEngine:
    engine = EmbeddedEngine(
        model, tokenizer, RolloutSettings.model_validate({"native": "required", "quantization": kind, **settings})
    )
    assert isinstance(engine._runner, NativeRunner)
    return engine


def mixed_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A mixture behind a dense layer, with shared experts, all of sizes that groups divide."""
    torch.manual_seed(3)
    return new_model({**SIZES, **MIXED, "initializer_range": 0.2}, vocab_size=VOCAB).to(dtype)


def gap(engine: EmbeddedEngine, twin: EmbeddedEngine) -> float:
    """The largest distance of log-probs of completions of an engine from those that another one gives them."""
    rollouts = engine.generate(PROMPTS, SAMPLING)
    scored = zip(twin.logprobs(rollouts), flat(rollouts), strict=True)
    return max(float((x - torch.tensor(c.raw_logprobs)).abs().max()) for x, c in scored)


@pytest.mark.parametrize("model", ["llama", "biases", "fused", "mixture"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_step_computes_the_rounded_model(kind: str, model: str, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = mixed_model() if model == "mixture" else model_of(model)
    exact = ["lm_head"] if kind == "int8" or model == "mixture" else ["lm_head", "down_proj"]  # of 48 inputs
    settings = RolloutSettings.model_validate({"quantization": {"type": kind, "exact": exact}})
    engine = native_engine(policy, tokenizer, {"type": kind, "exact": exact})
    twin = EmbeddedEngine(rounded_model(policy, settings), tokenizer, RolloutSettings(native="off"))
    assert gap(engine, twin) < 2e-3  # activations of 16 bits
    assert gap(engine, EmbeddedEngine(policy, tokenizer, RolloutSettings(native="off"))) > 1e-2
    predicted = engine_bytes(policy, settings.model_copy(update={"native": "required"}), torch.device("cpu"),
                             num_sequences=1, num_tokens=16)  # fmt: skip
    assert isinstance(engine._weights, NativeWeights)
    assert predicted >= 0.8 * (engine._weights.packed.num_bytes)
    assert engine.metrics()["engine/rounding_s"] > 0


@needs_bfloat16
@pytest.mark.parametrize("kind", KINDS)
def test_results_do_not_depend_on_other_rows_or_chunks(kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    policy = mixed_model(torch.bfloat16)
    plain, other = (
        native_engine(policy, tokenizer, kind, **settings) for settings in ({}, {"prefill_tokens": 3, "max_running": 3})
    )
    assert as_sampled(other.generate(PROMPTS, SAMPLING)) == as_sampled(plain.generate(PROMPTS, SAMPLING))


def test_updates_round_anew_and_rest_frees_the_codes(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = adapted(model_of("llama")).eval()
    engine = native_engine(policy, tokenizer, "int8")
    before = as_sampled(engine.generate(PROMPTS, SAMPLING))
    engine.rest()
    assert isinstance(engine._weights, NativeWeights) and engine._weights._packed is None
    assert as_sampled(engine.generate(PROMPTS, SAMPLING)) == before
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.mul_(-1)
    with pytest.raises(RolloutError, match="weights were changed"):
        engine.generate(PROMPTS, SAMPLING)
    engine.update_weights(1)
    fresh = native_engine(policy, tokenizer, "int8")
    after = engine.generate(PROMPTS, SAMPLING)
    assert as_sampled(after) == as_sampled(fresh.generate(PROMPTS, SAMPLING)) != before


def test_layers_that_are_computed_together_are_rounded_together(tokenizer: PreTrainedTokenizerFast) -> None:
    kind = {"type": "int8", "exact": ["lm_head", "k_proj"]}
    with pytest.raises(ConfigError, match=r"of q_proj, k_proj, v_proj, which it computes together.*exact has some"):
        native_engine(model_of("llama"), tokenizer, kind)
    engine = EmbeddedEngine(
        model_of("llama"), tokenizer, RolloutSettings.model_validate({"quantization": kind})
    )  # the Python step computes
    assert not isinstance(engine._runner, NativeRunner)
