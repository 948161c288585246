"""Caches that approximate: what they hold, and that the trainer's replay is the same function.

Schedules are compared in float64: in float32, a number that lies within 1e-7 of the middle between two codes is rounded
up by one and down by the other, which moves log-probs and says nothing of what was computed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.errors import ConfigError
from alignlab.loop.forward import PolicyForward
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.kv_approximation.choice import replayed_approximation
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.memory import engine_bytes
from alignlab.types import Rollout, SamplingParams
from tests.rollout.conftest import SIZES, VOCAB, MakeEngine, flat, make_prompts

CACHES: dict[str, dict[str, Any]] = {
    "int8": {"type": "int8"}, "fp8": {"type": "fp8"}, "int4": {"type": "int4", "group": 4},
    "int4 with nothing recent": {"type": "int4", "group": 8, "recent": 0},
    "window": {"type": "window", "tokens": 9, "sinks": 2},
    "wide sinks": {"type": "window", "tokens": 6, "sinks": 20},
    "evict": {"type": "evict", "heavy": 5, "recent": 3, "sinks": 2, "interval": 4, "observed": 4},
    "evict at the prompt's end": {
        "type": "evict", "heavy": 5, "recent": 3, "sinks": 0, "interval": None, "observed": 6, "accumulate": False,
    },
    "top_k": {"type": "top_k", "tokens": 4, "recent": 2}, "threshold": {"type": "threshold", "part": 0.3, "recent": 1},
    "mass": {"type": "threshold", "mass": 0.7, "recent": 2}, "low_rank": {"type": "low_rank", "rank": 4},
}
HAVE_NO_RECORD = ("window", "low_rank")
ALIKE = 2e-6
"""Log-probs are reported in float32."""
MODELS = ("llama", "dense")
SAMPLING = SamplingParams(n=3, max_new_tokens=20, ignore_eos=True, seed=2)
SCHEDULES: dict[str, dict[str, Any]] = {
    "tiny cache, chunks of 9": {"cache_tokens": 48, "prefill_tokens": 9},
    "one token a step, nothing shared": {"prefill_tokens": 1, "share_prefixes": False},
}


def replayed(model: PreTrainedModel, rollouts: list[Rollout], cache: dict[str, Any], budget: int = 150) -> list[Tensor]:
    """Return the trainer's log-probs of completions, with the approximation, on packs that share prompts."""
    policy = Policy(model, kv_approximation=replayed_approximation(RolloutSettings(kv_cache=cache), model))
    result: dict[int, Tensor] = {}
    for pack in pack_rollouts(rollouts, budget=budget):
        with torch.no_grad():
            output = PolicyForward()(policy.eval(), pack)
        for sequence in pack.segments.sequences:
            result[sequence] = output.logprobs[pack.segments.sequence_of_token == sequence]
    return [result[sequence] for sequence in range(len(result))]


def largest_gap(expected: list[Tensor], rollouts: list[Rollout]) -> float:
    pairs = zip(expected, flat(rollouts), strict=True)
    return max(float((x - torch.tensor(c.raw_logprobs)).abs().max()) for x, c in pairs)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("cache", CACHES)
def test_the_trainers_replay_has_the_engines_logprobs(
    cache: str, name: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(name).double()
    engine = make_engine(model, kv_cache=CACHES[cache])
    rollouts = engine.generate(make_prompts(9, 33, 16), SAMPLING)
    assert largest_gap(replayed(model, rollouts, CACHES[cache]), rollouts) < ALIKE
    assert largest_gap(replayed(model, rollouts, {"type": "exact"}), rollouts) > 1e-3
    for logprobs, completion in zip(engine.logprobs(rollouts), flat(rollouts), strict=True):
        torch.testing.assert_close(logprobs, torch.tensor(completion.raw_logprobs), atol=ALIKE, rtol=0)


@pytest.mark.parametrize("cache", CACHES)
def test_a_deep_model_in_float32_needs_the_record(cache: str, make_engine: MakeEngine) -> None:
    """A trainer that is 3e-5 off from the engine, as after many layers, takes the engine's codes by its record."""
    torch.manual_seed(3)
    model = new_model(SIZES | {"num_hidden_layers": 10}, vocab_size=VOCAB)
    rollouts = make_engine(model, kv_cache=CACHES[cache]).generate(make_prompts(32, 48), SAMPLING)
    assert largest_gap(replayed(model, rollouts, CACHES[cache]), rollouts) < 2e-5
    without = [
        replace(rollout, completions=tuple(replace(c, kv_record=None) for c in rollout.completions))
        for rollout in rollouts
    ]
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1 + 3e-5 * torch.randn(weight.shape))
    kept, lost = (largest_gap(replayed(model, given, CACHES[cache]), rollouts) for given in (rollouts, without))
    assert kept < 5e-3
    if CACHES[cache]["type"] not in HAVE_NO_RECORD and "evict" not in cache:  # few choices, of which none is near here
        assert lost > 4 * kept


@pytest.mark.parametrize("cache", ["int8", "int4", "evict", "top_k", "low_rank"])
def test_a_mixture_replays_experts_and_codes(cache: str, make_engine: MakeEngine, sparse: PreTrainedModel) -> None:
    rollouts = make_engine(sparse, kv_cache=CACHES[cache]).generate(make_prompts(9, 33, 16), SAMPLING)
    assert largest_gap(replayed(sparse, rollouts, CACHES[cache]), rollouts) < 1e-4


@pytest.mark.parametrize("cache", ["evict", "top_k", "mass", "low_rank"])
def test_the_cut_into_packs_does_not_change_the_replay(
    cache: str, make_engine: MakeEngine, dense: PreTrainedModel
) -> None:
    """Packs with a prompt for each completion, and one pack of all."""
    rollouts = make_engine(dense.double(), kv_cache=CACHES[cache]).generate(make_prompts(9, 33, 16), SAMPLING)
    alone, together = (replayed(dense, rollouts, CACHES[cache], budget=budget) for budget in (40, 1000))
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


@pytest.mark.parametrize("cache", ["evict", "top_k", "threshold", "low_rank"])
def test_bfloat16_is_replayed_within_its_own_rounding(
    cache: str, make_engine: MakeEngine, llama: PreTrainedModel
) -> None:
    """As far apart as engine and trainer are with an exact cache, which is 0.05 here; without a replay, over 1."""
    model = llama.bfloat16()
    rollouts = make_engine(model, kv_cache=CACHES[cache]).generate(make_prompts(9, 21, 40), SAMPLING)
    assert largest_gap(replayed(model, rollouts, CACHES[cache]), rollouts) < 0.1
    assert largest_gap(replayed(model, rollouts, {"type": "exact"}), rollouts) > 1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("cache", CACHES)
def test_scheduling_sharing_and_preemption_do_not_change_the_result(
    cache: str, schedule: str, make_engine: MakeEngine, dense: PreTrainedModel
) -> None:
    dense.double()
    prompts = make_prompts(9, 18, 13)
    expected = make_engine(dense, kv_cache=CACHES[cache]).generate(prompts, SAMPLING)
    engine = make_engine(dense, kv_cache=CACHES[cache], **SCHEDULES[schedule])
    for one, other in zip(flat(expected), flat(engine.generate(prompts, SAMPLING)), strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.raw_logprobs, other.raw_logprobs, atol=ALIKE, rtol=0)
    assert (engine.num_preempted > 0) == ("tiny" in schedule)
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks


@pytest.mark.parametrize(("cache", "dtype"), [("int8", torch.int8), ("fp8", torch.uint8)])
def test_codes_of_a_byte_are_all_that_is_kept(
    cache: str, dtype: torch.dtype, make_engine: MakeEngine, llama: PreTrainedModel
) -> None:
    engine = make_engine(kv_cache=CACHES[cache], cache_tokens=64)
    engine.generate(make_prompts(9), SAMPLING)
    layers = engine._runner.cache.layers
    assert {tensor.dtype for layer in layers.values() for name, tensor in layer.items() if "scales" not in name} == {
        dtype
    }
    held = sum(tensor.nbytes for layer in layers.values() for tensor in layer.values())
    assert held == engine._runner.cache_bytes == 64 * 2 * 2 * 2 * (8 + 4)  # layers, keys and values, heads
    exact, small = (
        engine_bytes(llama, RolloutSettings(kv_cache=kind), torch.device("cpu"), num_sequences=3, num_tokens=32)
        for kind in ({"type": "exact"}, CACHES[cache])
    )
    assert exact / small == 32 / 12


def test_old_tokens_are_kept_in_four_bits_and_new_ones_exactly(make_engine: MakeEngine) -> None:
    """Heads of 8 numbers; 2 heads and 2 layers."""
    engine = make_engine(kv_cache={"type": "int4", "group": 4, "recent": 2}, prefill_tokens=8)
    engine.generate(make_prompts(59), SamplingParams(max_new_tokens=50, ignore_eos=True))
    cache = engine._runner.cache
    assert cache.block_bytes(torch.float32) == {
        None: 2 * 2 * (16 * (4 + 4) + 4 * (2 * 4 * 8 + 16 * 2)),  # codes; scales and lows of 4 groups, and of values
        9: 2 * 2 * 2 * 16 * 8 * 4,
    }
    assert engine._runner.cache_bytes == sum(t.nbytes for layer in cache.layers.values() for t in layer.values())
    assert cache.num_blocks == {None: 7, 9: 4}  # blocks of 16 for 109 tokens; for 9 tokens, and 8 of a chunk
    for layer in cache.layers.values():
        assert layer["rounded_key_codes"].dtype == layer["rounded_value_codes"].dtype == torch.uint8
        assert layer["rounded_key_scales"].shape == (7 * 4, 16) and layer["rounded_value_scales"].shape == (7 * 16, 2)


def test_what_leaves_a_window_is_freed_but_for_sinks(make_engine: MakeEngine, dense: PreTrainedModel) -> None:
    """Layer 0 of `dense` has a window of 5 of its own, and keeps it."""
    engine = make_engine(dense, kv_cache={"type": "window", "tokens": 8, "sinks": 6}, block_size=4, prefill_tokens=4)
    engine.generate(make_prompts(60), SamplingParams(max_new_tokens=40, ignore_eos=True))
    [window] = set(engine._runner.cache.windows) - {5}
    assert window == (8, 6) and engine._runner.cache.windows_of(0) == (5,)
    assert engine._runner.cache.num_blocks[window] <= 2 + 3 + 1 + 1  # sinks, window, chunk


def test_blocks_hold_whole_groups(tokenizer: Any, llama: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match=r"block_size is 16, and must be a multiple of kv_cache\.group \(32\)"):
        RolloutSettings(block_size=16, kv_cache={"type": "int4"})
    assert EmbeddedEngine(llama, tokenizer, RolloutSettings(kv_cache={"type": "int4"}))._block_size == 32
    assert EmbeddedEngine(llama, tokenizer, RolloutSettings(kv_cache={"type": "int4", "group": 6}))._block_size == 18


def test_heads_of_an_odd_size_cannot_be_kept_in_four_bits(tokenizer: Any) -> None:
    odd = {"head_dim": 9, "partial_rotary_factor": 4 / 9}
    with pytest.raises(ConfigError, match=r"int4, which keeps two numbers in a byte, and heads have 9 numbers"):
        EmbeddedEngine(new_model(SIZES | odd, vocab_size=VOCAB), tokenizer, RolloutSettings(kv_cache={"type": "int4"}))


def test_a_layer_with_latents_cannot_have_an_approximate_cache(tokenizer: Any) -> None:
    latent = {
        "layer_types": ["full_attention", "latent_attention"], "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8,
    }
    with pytest.raises(ConfigError, match=r"kv_cache is int8, and layer 1 keeps a latent.*use rollout\.kv_cache"):
        EmbeddedEngine(
            new_model(SIZES | latent, vocab_size=VOCAB), tokenizer, RolloutSettings(kv_cache={"type": "int8"})
        )
