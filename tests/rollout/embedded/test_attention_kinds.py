"""The embedded engine over every kind of attention: its tokens and log-probs are those of full forward passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.models.adapters import add_lora
from alignlab.models.cache_spec import cache_specs
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.weights import EngineWeights, PackedLinear
from alignlab.rollout.memory import engine_bytes
from alignlab.types import SamplingParams
from tests.models.attention_kinds import KINDS, make_model
from tests.reference.float64 import grouped_in_float64
from tests.rollout.conftest import VOCAB, MakeEngine, flat, full_logprobs, make_prompts

SCHEDULES: dict[str, dict[str, Any]] = {
    "prefill by 3": {"prefill_tokens": 3},
    "all at once": {"cache_tokens": 60, "block_size": 2, "prefill_tokens": 5, "max_running": 6},
    "nothing shared": {"share_prefixes": False, "block_size": 5},
}
PAGED_KINDS = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True, scope="module")
def any_dtype() -> Iterator[None]:
    """Experts are computed in float64 too."""
    with grouped_in_float64():
        yield


def model_of(kind: str) -> PolicyForCausalLM:
    return make_model(kind, vocab_size=VOCAB)


@PAGED_KINDS
@pytest.mark.parametrize(  # the engine takes log-probs in float32
    ("dtype", "std", "gap"), [(torch.float64, 0.3, 1e-6), (torch.float32, 0.1, 1e-5)], ids=str
)
def test_greedy_tokens_and_logprobs_are_those_of_the_full_forward(
    kind: str, dtype: torch.dtype, std: float, gap: float, make_engine: MakeEngine
) -> None:
    model, prompts = make_model(kind, vocab_size=VOCAB, initializer_range=std).to(dtype), make_prompts(1, 6, 16, 23)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=20, ignore_eos=True)
    for prompt, completion in zip(prompts, flat(make_engine(model).generate(prompts, sampling)), strict=True):
        rows = full_logprobs(model, (*prompt.token_ids, *completion.token_ids))[len(prompt.token_ids) - 1 : -1]
        assert completion.token_ids == tuple(rows.argmax(-1).tolist())
        logprobs = torch.tensor(completion.raw_logprobs, dtype=dtype)
        torch.testing.assert_close(logprobs, rows.max(-1).values, atol=gap, rtol=0)


@PAGED_KINDS
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_chunks_forks_and_preemption_do_not_change_the_result(
    kind: str, schedule: str, make_engine: MakeEngine
) -> None:
    model, prompts = model_of(kind).double(), make_prompts(5, 17, 32, 1, 17)
    sampling = SamplingParams(n=4, max_new_tokens=14, seed=3, ignore_eos=True)
    expected = make_engine(model).generate(prompts, sampling)
    engine = make_engine(model, **SCHEDULES[schedule])
    for plain, scheduled in zip(flat(expected), flat(engine.generate(prompts, sampling)), strict=True):
        assert plain.token_ids == scheduled.token_ids
        torch.testing.assert_close(plain.raw_logprobs, scheduled.raw_logprobs, atol=1e-10, rtol=0)
    assert (engine.num_preempted > 0) == (schedule == "all at once")


def adapted(kind: str) -> nn.Module:
    """A model with an adapter on every linear layer that changes its log-probs."""
    policy = add_lora(model_of(kind), LoraSettings(rank=4, alpha=8))
    torch.manual_seed(9)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.2)
    return policy.eval()


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "as it is"])
@pytest.mark.parametrize("kind", ["latent", "latent-plain-query", "gated", "all"])
def test_an_adapter_is_in_the_rollouts_merged_or_not(kind: str, merge: bool, tokenizer: Any) -> None:
    """Of latent attention in particular: `kv_b_proj.weight` is the base's, and decoding multiplies by weights."""
    policy, prompts = adapted(kind), make_prompts(6, 13)
    engine = EmbeddedEngine(policy, tokenizer, RolloutSettings(merge_lora=merge, block_size=4))
    completions = flat(engine.generate(prompts, SamplingParams(n=2, max_new_tokens=9, ignore_eos=True, seed=1)))
    for index, completion in enumerate(completions):
        tokens = (*prompts[index // 2].token_ids, *completion.token_ids)
        rows = full_logprobs(policy, tokens)[-len(completion.token_ids) - 1 : -1]
        expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.raw_logprobs), expected, atol=3e-5, rtol=0)
        with policy.disable_adapter():  # type: ignore[operator]
            base = full_logprobs(policy, tokens)[-len(completion.token_ids) - 1 : -1]
        assert (base - rows).abs().max() > 0.1


def test_layers_whose_weights_are_read_are_never_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("latent").bfloat16()
    monkeypatch.setattr("alignlab.rollout.embedded.weights._packing_helps", lambda _: True)
    layer: Any = model.model.layers[0].self_attn
    weights = EngineWeights(model, merge=False, pack=True)
    with weights.in_use():
        assert type(layer.kv_b_proj) is nn.Linear and type(layer.o_proj) is PackedLinear
    for merge in (True, False):
        policy = adapted("latent").bfloat16()
        attention: Any = policy.base_model.model.model.layers[0].self_attn
        with EngineWeights(policy, merge=merge, pack=True).in_use():
            assert type(attention.kv_b_proj) is not PackedLinear


@PAGED_KINDS
def test_sampling_in_bfloat16_agrees_with_the_full_forward_to_its_rounding(kind: str, make_engine: MakeEngine) -> None:
    model, prompts = make_model(kind, vocab_size=VOCAB, initializer_range=0.1).bfloat16(), make_prompts(6, 13)
    sampling = SamplingParams(n=2, max_new_tokens=8, ignore_eos=True, seed=1)
    gaps = []
    for rollout in make_engine(model).generate(prompts, sampling):
        for completion in rollout.completions:
            rows = full_logprobs(model, (*rollout.prompt.token_ids, *completion.token_ids))[-9:-1]
            expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            gaps.append((torch.tensor(completion.raw_logprobs) - expected).abs().max())
    assert max(gaps) < 0.08


@PAGED_KINDS
def test_the_cache_has_the_size_that_was_predicted(kind: str, make_engine: MakeEngine) -> None:
    model, prompts = model_of(kind), make_prompts(10, 10)
    engine = make_engine(model, block_size=4)
    engine.generate(prompts, SamplingParams(max_new_tokens=7, ignore_eos=True))
    caches = (engine._runner.cache, engine._runner.states)
    tensors = [tensor for cache in caches for layer in cache.layers.values() for tensor in layer.values()]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    settings = RolloutSettings(block_size=4)
    assert taken == engine_bytes(model, settings, torch.device("cpu"), num_sequences=2, num_tokens=17)
    numbers = sum(spec.token_numel for spec in cache_specs(model).values())
    assert sum(engine._runner.block_bytes.values()) == 4 * 4 * numbers
