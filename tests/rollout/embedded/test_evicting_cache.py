"""A cache with a budget: what it holds, what forks share, and what a sequence that is computed again drops."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from alignlab.errors import ConfigError
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.kv_approximation import evicted_tokens
from alignlab.models.sink_window import KeptTokens
from alignlab.rollout.embedded.beams import BeamParams
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.types import SamplingParams
from tests.rollout.conftest import SIZES, VOCAB, MakeEngine, flat, make_prompts
from tests.rollout.embedded.test_kv_caches import ALIKE, largest_gap, replayed

CACHE: dict[str, Any] = {"type": "evict", "heavy": 5, "recent": 2, "sinks": 1, "interval": 4, "observed": 4}
KEPT = KeptTokens(5, 2, 1, 4, 4)


def watch_blocks(engine: EmbeddedEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that each step adds its number of used blocks of the budget's pool to."""
    counts: list[int] = []
    compute = engine._runner.hidden

    def hidden(*args: Any) -> Any:
        manager = engine._space.blocks.managers[KEPT]
        counts.append(manager.num_blocks - manager.num_free)
        return compute(*args)

    monkeypatch.setattr(engine._runner, "hidden", hidden)
    return counts


def test_dropped_tokens_free_their_blocks(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of 40 tokens in blocks of 4, of which 8 stay, and 4 more may come. An exact cache would end with 17."""
    engine = make_engine(kv_cache=CACHE, block_size=4)
    counts = watch_blocks(engine, monkeypatch)
    engine.generate(make_prompts(40), SamplingParams(max_new_tokens=28, ignore_eos=True))
    assert counts[0] == 10 and set(counts[1:]) == {3}
    assert engine._runner.cache.num_blocks[KEPT] <= 10 + 3
    held = sum(tensor.nbytes for layer in engine._runner.cache.layers.values() for tensor in layer.values())
    assert held == engine._runner.cache_bytes


def test_forks_share_what_stays_of_their_prompt(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """8 tokens stay in 2 blocks of 4, which 5 completions share, and each has a block of its own after them."""
    engine = make_engine(kv_cache=CACHE, block_size=4)
    counts = watch_blocks(engine, monkeypatch)
    rollouts = engine.generate(make_prompts(40), SamplingParams(n=5, max_new_tokens=4, ignore_eos=True, seed=1))
    assert counts == [10, 2 + 5, 2 + 5, 2 + 5]
    first, *others = [completion.kv_record[:40] for completion in flat(rollouts)]
    assert all(torch.equal(record, first) for record in others) and bool((first[:, :, 1:] > 0).any())


def test_a_prompt_that_begins_as_another_is_found(make_engine: MakeEngine) -> None:
    """Blocks of a prompt are found, and those of what stayed are not."""
    [prompt], sampling = make_prompts(40), SamplingParams(max_new_tokens=12, ignore_eos=True, seed=1)
    other = type(prompt)((*prompt.token_ids[:32], *range(8)), "")
    engine = make_engine(kv_cache=CACHE, block_size=4)
    engine.generate([prompt], sampling)
    before = engine.num_computed
    [found] = flat(engine.generate([other], sampling))
    assert engine.num_computed - before == 40 - 32 + 11
    [expected] = flat(make_engine(kv_cache=CACHE, block_size=4).generate([other], sampling))
    assert found.token_ids == expected.token_ids
    torch.testing.assert_close(found.raw_logprobs, expected.raw_logprobs, atol=1e-5, rtol=0)
    assert torch.equal(found.kv_record, expected.kv_record)


@pytest.mark.parametrize("lengths", [(9, 18, 13), (12, 20, 16)], ids=["between blocks", "whole blocks"])
def test_a_sequence_that_is_computed_again_drops_the_same_tokens(
    lengths: tuple[int, ...], make_engine: MakeEngine, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if what tokens received is another number the second time, and where a prompt is found up to its end."""
    exact, calls = evicted_tokens.attention_received, iter(range(10**6))

    def shaken(*args: Any) -> torch.Tensor:
        generator = torch.Generator().manual_seed(next(calls))
        received = exact(*args)
        return received + torch.rand(received.shape, generator=generator)

    monkeypatch.setattr(evicted_tokens, "attention_received", shaken)
    engine = make_engine(llama.double(), kv_cache=CACHE, block_size=4, cache_tokens=48, prefill_tokens=9)
    sampling = SamplingParams(n=3, max_new_tokens=20, ignore_eos=True, seed=2)
    rollouts = engine.generate(make_prompts(*lengths), sampling)
    assert engine.num_preempted > 0
    assert largest_gap(replayed(llama, rollouts, CACHE), rollouts) < ALIKE


def test_a_group_whose_first_completion_has_one_token_is_replayed(
    make_engine: MakeEngine, llama: PreTrainedModel
) -> None:
    """That one ended before tokens of the prompt were dropped, and its record says nothing of them."""
    engine, prompts = make_engine(llama.double(), kv_cache=CACHE), make_prompts(21)
    short, long = (
        engine.generate(prompts, SamplingParams(n=2, max_new_tokens=count, ignore_eos=True, seed=3))[0]
        for count in (1, 9)
    )
    rollouts = [replace(long, completions=(*short.completions, *long.completions))]
    assert largest_gap(replayed(llama, rollouts, CACHE), rollouts) < ALIKE


def test_every_beam_has_its_own_record(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    engine = make_engine(llama.double(), kv_cache=CACHE, block_size=4)
    params = BeamParams(num_beams=3, num_best=3, max_new_tokens=12)
    for result in engine.beam_search(make_prompts(9, 21), params):
        assert largest_gap(replayed(llama, [result.rollout], CACHE), [result.rollout]) < ALIKE


def test_what_cannot_be_had_is_refused(make_engine: MakeEngine) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache\.rank is 9, and must be at most the size of a head.*is 8"):
        make_engine(kv_cache={"type": "low_rank", "rank": 9})
    assert make_engine(kv_cache={"type": "low_rank", "rank": 2}).generate([], SamplingParams()) == []
    latent = {
        "layer_types": ["full_attention", "latent_attention"], "kv_lora_rank": 8, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4, "v_head_dim": 8,
    }
    windowed = new_model(SIZES | {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5}, vocab_size=VOCAB)
    for cache in (CACHE, {"type": "top_k"}, {"type": "threshold", "mass": 0.5}):
        with pytest.raises(ConfigError, match=rf"is {cache['type']}, and all layers have windows of their own"):
            make_engine(windowed, kv_cache=cache)
    model = new_model(SIZES | latent, vocab_size=VOCAB)
    for cache in (CACHE, {"type": "top_k"}, {"type": "low_rank", "rank": 2}):
        with pytest.raises(ConfigError, match=rf"kv_cache is {cache['type']}, and layer 1 keeps a latent"):
            make_engine(model, kv_cache=cache)
