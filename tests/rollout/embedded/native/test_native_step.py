"""The native step against the Python step."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from alignlab.config.rollout import RolloutSettings
from alignlab.errors import RolloutError
from alignlab.models.hub.checkpoints import new_model, save_model
from alignlab.rollout.embedded.beams import BeamParams
from alignlab.rollout.embedded.draft_model import DraftModel
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.native.model import NativeModel
from alignlab.rollout.embedded.native.runner import NativeRunner
from alignlab.rollout.embedded.native.weights import NativeWeights
from alignlab.rollout.memory import engine_bytes
from alignlab.types import Completion, Prompt, Rollout, SamplingParams
from tests.rollout.conftest import SIZES, VOCAB, flat, full_logprobs, make_prompts
from tests.rollout.embedded.native.conftest import SHAPES, MakeBoth, model_of, needs_bfloat16, needs_kernels
from tests.rollout.embedded.test_weights import adapted

pytestmark = needs_kernels
SAMPLING = SamplingParams(n=2, max_new_tokens=12, seed=4, ignore_eos=True)
PROMPTS = make_prompts(1, 6, 17, 33)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)], ids=["float32", "bfloat16"]
)


def as_sampled(rollouts: list[Rollout]) -> list[tuple[Any, ...]]:
    """Tokens and log-probs of all completions, to be compared bit for bit."""
    return [(c.token_ids, c.logprobs, c.raw_logprobs) for c in flat(rollouts)]


@pytest.mark.parametrize("shape", SHAPES)
def test_tokens_logprobs_and_experts_are_those_of_the_python_step(shape: str, both: MakeBoth) -> None:
    python, native = both(model_of(shape), block_size=4, prefill_tokens=40)
    assert isinstance(native._runner, NativeRunner) and not isinstance(python._runner, NativeRunner)
    expected, computed = (flat(engine.generate(PROMPTS, SAMPLING)) for engine in (python, native))
    for plain, completion in zip(expected, computed, strict=True):
        assert completion.token_ids == plain.token_ids
        for name in ("logprobs", "raw_logprobs"):
            torch.testing.assert_close(
                torch.tensor(getattr(completion, name)), torch.tensor(getattr(plain, name)), atol=1e-5, rtol=0
            )
        if "num_experts" in SHAPES[shape]:
            assert completion.routing is not None and plain.routing is not None
            assert torch.equal(completion.routing.sort(-1).values, plain.routing.sort(-1).values)
        else:
            assert completion.routing is None


@pytest.mark.parametrize("shape", ["llama", "windows-caps"])
@pytest.mark.parametrize("projection", ["q_proj", "k_proj"])
def test_scores_that_are_no_numbers_end_the_call(projection: str, shape: str, both: MakeBoth) -> None:
    model = model_of(shape)
    with torch.no_grad():
        model.get_submodule(f"model.layers.0.self_attn.{projection}").weight[0, 0] = torch.nan
    for engine in both(model):
        with pytest.raises(RolloutError, match="logits must be finite"):
            engine.generate(PROMPTS, SAMPLING)


SCHEDULES: dict[str, dict[str, Any]] = {
    "prefill by 3": {"prefill_tokens": 3},
    "one at a time": {"max_running": 1},
    "pre-empted": {"cache_tokens": 60, "block_size": 2, "prefill_tokens": 5, "max_running": 6},
    "swapped": {
        "cache_tokens": 60, "block_size": 2, "prefill_tokens": 5, "max_running": 6, "preemption": "swap",
    },
    "large blocks": {"block_size": 48},
    "drafts": {"speculation": {"type": "ngram", "min_match": 1, "num_drafts": 3, "always": True}},
}


@DTYPES
@pytest.mark.parametrize("shape", ["windows-caps", "one-kv-head", "sigmoid-shared"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_results_do_not_depend_on_other_rows_chunks_blocks_or_preemption(
    schedule: str, shape: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = model_of(shape, dtype=dtype)
    settings = {"native": "required", **SCHEDULES[schedule]}
    plain, other = (
        EmbeddedEngine(model, tokenizer, RolloutSettings.model_validate(s)) for s in ({"native": "required"}, settings)
    )
    assert as_sampled(other.generate(PROMPTS, SAMPLING)) == as_sampled(plain.generate(PROMPTS, SAMPLING))
    assert (other.num_preempted > 0) == (schedule in ("pre-empted", "swapped"))
    assert other.metrics().get("engine/swapped_in", 0) == (other.num_preempted if schedule == "swapped" else 0)


@pytest.mark.parametrize("shape", ["windows-caps", "sigmoid-shared"])
def test_beams_are_those_of_the_python_step(shape: str, both: MakeBoth) -> None:
    python, native = (
        engine.beam_search(PROMPTS[:2], BeamParams(num_beams=3, num_best=2, max_new_tokens=8))
        for engine in both(model_of(shape))
    )
    for expected, found in zip(python, native, strict=True):
        assert found.scores == pytest.approx(expected.scores, abs=1e-5)
        for one, other in zip(expected.rollout.completions, found.rollout.completions, strict=True):
            assert one.token_ids == other.token_ids


@DTYPES
@pytest.mark.parametrize("shape", ["llama", "shared-gate"])
def test_results_do_not_depend_on_the_number_of_threads(
    shape: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = EmbeddedEngine(
        model_of(shape, dtype=dtype), tokenizer, RolloutSettings(native="required"), share_prefixes=False
    )
    before, results = torch.get_num_threads(), []
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            results.append(as_sampled(engine.generate(PROMPTS, SAMPLING)))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]


@DTYPES
def test_given_completions_have_the_logprobs_that_they_were_sampled_with(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = EmbeddedEngine(model_of("windows-caps", dtype=dtype), tokenizer, RolloutSettings(native="required"))
    rollouts = engine.generate(PROMPTS, SAMPLING)
    for completion, logprobs in zip(flat(rollouts), engine.logprobs(rollouts), strict=True):
        torch.testing.assert_close(torch.tensor(completion.raw_logprobs), logprobs, atol=2e-6, rtol=0)


@DTYPES
def test_drafts_that_are_checked_together_change_nothing(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, [prompt] = model_of("windows-caps", dtype=dtype, std=0.02), make_prompts(9)  # so that it repeats itself
    repeating = [Prompt(prompt.token_ids * 3, "")]
    sampling = SamplingParams(n=2, temperature=0.0, max_new_tokens=40, ignore_eos=True)
    plain, drafting = (
        EmbeddedEngine(model, tokenizer, RolloutSettings.model_validate({"native": "required", **settings}))
        for settings in ({}, {"speculation": {"type": "ngram", "always": True}})
    )
    results = [as_sampled(engine.generate(repeating, sampling)) for engine in (plain, drafting)]
    assert results[0] == results[1]
    assert drafting.metrics()["engine/draft_acceptance"] > 0


@DTYPES
@pytest.mark.parametrize("num_drafts", [1, 3])
def test_drafts_of_the_layer_for_multi_token_prediction_change_nothing(
    num_drafts: int, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(3)
    model = new_model({**SIZES, "num_mtp_layers": 1}, vocab_size=VOCAB).to(dtype).train()
    speculation = {"type": "mtp", "num_drafts": num_drafts, "always": True}
    plain, drafting = (
        EmbeddedEngine(model, tokenizer, RolloutSettings.model_validate({"native": "required", **settings}))
        for settings in ({}, {"speculation": speculation})
    )
    assert isinstance(drafting._runner, NativeRunner)
    results = [as_sampled(engine.generate(PROMPTS, SAMPLING)) for engine in (plain, drafting, drafting)]
    assert results[0] == results[1] == results[2]
    assert drafting._speculation.num_drafted > 0 and all(module.training for module in model.modules())


def test_the_layer_s_drafts_are_those_beside_the_python_step(both: MakeBoth) -> None:
    torch.manual_seed(3)
    model = new_model({**SIZES, "num_mtp_layers": 1}, vocab_size=VOCAB)
    counts = []
    for engine in both(model, speculation={"type": "mtp", "num_drafts": 3, "always": True}):
        engine.generate(PROMPTS, replace(SAMPLING, temperature=0.2))
        counts.append((engine._speculation.num_drafted, engine._speculation.num_accepted))
    assert counts[0] == counts[1]


@DTYPES
def test_a_draft_model_computes_by_the_native_step_where_the_policy_does(
    dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = model_of("llama", dtype=dtype)
    save_model(model, tmp_path)
    tokenizer.save_pretrained(tmp_path)
    speculation = {"type": "model", "model": str(tmp_path), "num_drafts": 3, "always": True}
    plain, drafting = (
        EmbeddedEngine(model, tokenizer, RolloutSettings.model_validate({"native": "required", **settings}))
        for settings in ({}, {"speculation": speculation})
    )
    drafter = drafting._speculation._drafter
    assert isinstance(drafter, DraftModel) and isinstance(drafter._runner, NativeRunner)
    results = [as_sampled(engine.generate(PROMPTS, SAMPLING)) for engine in (plain, drafting)]
    assert results[0] == results[1]
    assert drafting.metrics()["engine/draft_acceptance"] > 0.9, "it drafts for itself"
    assert drafter._weights._packed is not None and drafter._runner.cache.num_blocks[None] > 0
    drafting.rest()
    assert drafter._weights._packed is None and drafter._runner.cache.num_blocks[None] == 0
    assert as_sampled(drafting.generate(PROMPTS, SAMPLING)) == results[0]


@needs_bfloat16
@pytest.mark.parametrize("shape", ["llama", "normed-heads", "norms-of-outputs", "sinks"])
def test_bfloat16_is_as_near_to_the_float32_model_as_the_python_step_is(shape: str, both: MakeBoth) -> None:
    model = model_of(shape, dtype=torch.bfloat16, std=0.1)
    exact = copy.deepcopy(model).float()
    prompts = make_prompts(*[6, 13, 20, 9] * 3, seed=5)

    def gap(completion: Completion, index: int) -> torch.Tensor:
        rows = full_logprobs(exact, (*prompts[index // 2].token_ids, *completion.token_ids))[-13:-1]
        given = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        return (torch.tensor(completion.raw_logprobs) - given).abs()

    python, native = (
        torch.cat([gap(completion, i) for i, completion in enumerate(flat(engine.generate(prompts, SAMPLING)))])
        for engine in both(model)
    )
    assert native.mean() < 1.05 * python.mean()
    assert native.max() < 1.5 * python.max()


def test_greedy_penalised_and_truncated_rows_of_one_batch_are_those_of_the_python_step(both: MakeBoth) -> None:
    params = [
        SamplingParams(temperature=0.0, max_new_tokens=9, ignore_eos=True),
        SamplingParams(temperature=0.6, max_new_tokens=9, seed=1, ignore_eos=True),
        SamplingParams(top_k=5, top_p=0.8, repetition_penalty=1.3, max_new_tokens=9, seed=2, ignore_eos=True),
        SamplingParams(min_new_tokens=9, max_new_tokens=9, seed=3),
    ]
    python, native = both(model_of("llama"))
    expected, computed = (flat(engine.generate(PROMPTS, params)) for engine in (python, native))
    assert [c.token_ids for c in computed] == [c.token_ids for c in expected]
    expected, computed = (flat(engine.generate(PROMPTS[:2], params[:2])) for engine in (python, native))
    assert [c.token_ids for c in computed] == [c.token_ids for c in expected]
    assert set(computed[0].logprobs) == {0.0}
    torch.testing.assert_close(computed[1].logprobs, expected[1].logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shape", ["llama", "mixture"])
def test_adapters_are_merged_and_updates_are_taken_over(shape: str, both: MakeBoth) -> None:
    policy: Any = adapted(model_of(shape))
    python, native = both(policy)
    first = flat(native.generate(PROMPTS, SAMPLING))
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.mul_(-1.5)
    with pytest.raises(RolloutError, match="weights were changed since version 0"):
        native.generate(PROMPTS, SAMPLING)
    for engine in (python, native):
        engine.update_weights(1)
    expected, computed = (flat(engine.generate(PROMPTS, SAMPLING)) for engine in (python, native))
    assert [c.token_ids for c in computed] == [c.token_ids for c in expected] != [c.token_ids for c in first]
    for plain, completion in zip(expected, computed, strict=True):
        torch.testing.assert_close(completion.raw_logprobs, plain.raw_logprobs, atol=1e-5, rtol=0)


def test_packed_weights_are_freed_at_rest_and_packed_again(tokenizer: PreTrainedTokenizerFast) -> None:
    engine = EmbeddedEngine(model_of("llama"), tokenizer, RolloutSettings(native="required"))
    weights = engine._weights
    assert isinstance(weights, NativeWeights) and weights._packed is None
    first = as_sampled(engine.generate(PROMPTS, SAMPLING))
    assert weights._packed is not None
    engine.rest()
    assert weights._packed is None
    assert as_sampled(engine.generate(PROMPTS, SAMPLING)) == first
    engine.close()
    assert weights._packed is None


@pytest.mark.parametrize("shape", ["llama", "biases", "mixture-after-dense"])
def test_the_predicted_memory_is_that_of_cache_and_packed_weights(
    shape: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = model_of(shape)
    settings = RolloutSettings(native="required", block_size=4)
    engine = EmbeddedEngine(model, tokenizer, settings)
    engine.generate(make_prompts(10, 10), SamplingParams(max_new_tokens=7, ignore_eos=True))
    packed: NativeModel = engine._weights.packed  # type: ignore[attr-defined]
    cache = sum(t.nbytes for layer in engine._runner.cache.layers.values() for t in layer.values())
    predicted = engine_bytes(model, settings, torch.device("cpu"), num_sequences=2, num_tokens=17)
    padding = packed.num_bytes - (predicted - cache)
    assert 0 <= padding < 0.35 * packed.num_bytes  # panels of 32 outputs: much of a tiny model, little of a real one
    without = engine_bytes(
        model, RolloutSettings(native="off", block_size=4), torch.device("cpu"), num_sequences=2, num_tokens=17
    )
    assert without == cache


def test_logits_that_are_not_finite_are_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    model = model_of("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 4] = torch.nan
    engine = EmbeddedEngine(model, tokenizer, RolloutSettings(native="required"))
    with pytest.raises(RolloutError, match="logits must be finite"):
        engine.generate(PROMPTS, SAMPLING)
