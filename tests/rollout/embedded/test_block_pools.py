"""Blocks of windows: what is released, what is found again, and how large the pools must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.config.rollout import RolloutSettings
from alignlab.models.sink_window import SinkWindow
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.embedded.block_pools import (
    EXPIRED,
    BlockPools,
    PoolNeed,
    first_visible,
    most_blocks,
    pool_blocks,
    shared_out,
)
from alignlab.rollout.memory import engine_bytes
from alignlab.types import SamplingParams
from tests.models.attention_kinds import make_model
from tests.rollout.conftest import VOCAB, MakeEngine, flat, full_logprobs, make_prompts

WINDOW = 6
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "no_rope_layers": None}
ALL_WINDOWS = MIXED | {"layer_types": ["sliding_attention"] * 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def windowed(**changes: Any) -> PolicyForCausalLM:
    return make_model("no-positions", vocab_size=VOCAB, **{**MIXED, **changes})


@given(st.integers(0, 40), st.integers(1, 20), st.integers(1, 7))
def test_the_first_visible_block_holds_the_first_visible_token(position: int, window: int, size: int) -> None:
    seen = [token for token in range(position + 1) if token > position - window]
    assert first_visible(position, window, size) == seen[0] // size
    assert first_visible(position, None, size) == 0


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 9), st.integers(1, 7))
def test_no_sequence_holds_more_than_the_most_blocks(num_tokens: int, window: int, chunk: int, size: int) -> None:
    held = []
    for start in range(num_tokens):
        end = min(start + chunk, num_tokens)
        held.append(-(-end // size) - first_visible(start, window, size))
    assert max(held) <= most_blocks(num_tokens, window, chunk, size) <= most_blocks(num_tokens, None, chunk, size)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 9), max_size=12), st.lists(st.integers(0, 9), max_size=12), st.integers(1, 11))
def test_what_is_found_is_all_that_later_tokens_read(full: list[int], last: list[int], window: int) -> None:
    size, digests = 3, [bytes([index]) for index in range(10)]
    pools = BlockPools([None, window], size)
    pools.grow({None: 10, window: 10})
    for manager, published in ((pools.managers[None], full), (pools.managers[window], last)):
        for index in set(published):
            block = manager.allocate()
            manager.publish(block, digests[index])
            manager.release(block)
    expected = 0
    for count in range(1, 11):
        needed = range(first_visible(count * size, window, size), count)
        if set(range(count)) <= set(full) and set(needed) <= set(last):
            expected = count
    found, tables = pools.find(digests)
    assert found == digests[:expected]
    first = first_visible(expected * size, window, size)
    assert [len(table) for table in tables.values()] == [expected, expected]
    assert EXPIRED not in tables[None] and tables[window][:first] == [EXPIRED] * first
    assert all(pools.managers[window].users(block) == 1 for block in tables[window][first:])
    pools.release(tables)
    assert pools.num_free == 20


@settings(max_examples=40)
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(1, 8), st.integers(0, 7))
def test_sinks_are_found_again_with_the_window(published: list[int], tokens: int, sinks: int) -> None:
    size, digests, window = 3, [bytes([index]) for index in range(10)], SinkWindow(tokens, sinks)
    pools = BlockPools([window], size)
    pools.grow({window: 10})
    for index in set(published):
        block = pools.managers[window].allocate()
        pools.managers[window].publish(block, digests[index])
        pools.managers[window].release(block)
    needed: set[int] = set()
    expected = 0
    for count in range(1, 11):
        positions = [p for p in range(count * size) if p > count * size - tokens or p < sinks]
        if {position // size for position in positions} <= set(published):
            expected, needed = count, {position // size for position in positions}
    found, tables = pools.find(digests)
    assert found == digests[:expected]
    assert {index for index, block in enumerate(tables[window]) if block != EXPIRED} == needed
    pools.release(tables)
    assert pools.num_free == 10


def test_a_window_leaves_its_sinks_behind() -> None:
    window = SinkWindow(4, 3)
    pools = BlockPools([window], 2)
    pools.grow({window: 9})
    tables = {window: [pools.managers[window].allocate() for _ in range(8)]}
    first, second, *_, last = tables[window]
    pools.expire(tables, 11)  # sees 0 to 2, and 8 to 11
    assert tables[window][:4] == [first, second, EXPIRED, EXPIRED] and EXPIRED not in tables[window][4:]
    pools.expire(tables, 15)
    assert tables[window] == [first, second, *[EXPIRED] * 4, tables[window][6], last]
    assert most_blocks(100, window, 1, 2) == 2 + 3 and most_blocks(6, window, 1, 2) == 3


def test_a_block_that_others_use_stays_theirs() -> None:
    pools = BlockPools([4], 2)
    pools.grow({4: 6})
    manager = pools.managers[4]
    tables = {4: [manager.allocate() for _ in range(4)]}
    fork = pools.share(tables)
    first, second = tables[4][:2]
    pools.expire(tables, 7)  # sees 4 to 7
    assert tables[4][:2] == [EXPIRED, EXPIRED] and manager.users(first) == manager.users(second) == 1
    pools.expire(fork, 5)  # sees 2 to 5
    assert fork[4][:2] == [EXPIRED, second] and manager.users(first) == 0
    pools.release(tables)
    pools.release(fork)
    assert pools.num_free == 6


def test_memory_is_shared_out_by_what_is_needed() -> None:
    sizes, needs = {None: 10, 8: 30}, {None: PoolNeed(5, 50), 8: PoolNeed(2, 20)}
    assert shared_out(10**6, sizes, needs) == {None: 50, 8: 20}
    assert shared_out(110, sizes, needs) == {None: 5, 8: 2}
    part = shared_out(600, sizes, needs)
    assert sum(sizes[window] * count for window, count in part.items()) <= 600
    assert part == {None: 5 + 45 * 490 // 990, 8: 2 + 18 * 490 // 990}
    assert shared_out(55, sizes, needs) == {None: 2, 8: 1}
    assert shared_out(123, {None: 7}, {None: PoolNeed(2, 99)}) == {None: 17}, "one pool has all that fits"


@pytest.mark.parametrize("changes", [MIXED, ALL_WINDOWS, ALL_WINDOWS | EXPERTS], ids=["mixed", "windows", "experts"])
@pytest.mark.parametrize("schedule", [{}, {"prefill_tokens": 5}, {"cache_tokens": 72, "prefill_tokens": 7}], ids=str)
def test_windows_hold_few_blocks_and_compute_what_the_full_forward_does(
    changes: dict[str, Any], schedule: dict[str, int], make_engine: MakeEngine
) -> None:
    model, prompts = windowed(**changes), make_prompts(30, 41, 3)
    engine = make_engine(model, block_size=4, **schedule)
    held: list[int] = []
    sampling = SamplingParams(n=3, max_new_tokens=25, ignore_eos=True, seed=1)

    def count(*_: int) -> None:
        manager = engine._space.blocks.managers[WINDOW]
        held.append(manager.num_blocks - manager.num_free)

    rollouts = engine.generate(prompts, sampling, on_step=count)
    for rollout in rollouts:
        for completion in rollout.completions:
            tokens = (*rollout.prompt.token_ids, *completion.token_ids)
            rows = full_logprobs(model, tokens)[len(rollout.prompt.token_ids) - 1 : -1]
            expected = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.raw_logprobs), expected, atol=1e-5, rtol=0)
            assert (completion.routing is not None) == ("num_experts" in changes)
            assert completion.routing is None or (completion.routing[:-1] >= 0).all()
    lengths = [len(prompt.token_ids) + 25 for prompt in prompts for _ in range(3)]
    assert max(held) <= pool_blocks(lengths, WINDOW, schedule.get("prefill_tokens", 2048), 4)
    assert max(held[-5:]) <= 9 * (most_blocks(99, WINDOW, 1, 4) + 1), "at the end all sequences are being decoded"
    assert (engine.num_preempted > 0) == ("cache_tokens" in schedule)
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks
    again = make_engine(model, block_size=4, share_prefixes=False).generate(prompts, sampling)
    assert [c.token_ids for c in flat(again)] == [c.token_ids for c in flat(rollouts)]


def test_a_prompt_is_found_again_where_its_window_is_still_there(make_engine: MakeEngine) -> None:
    engine, prompts = make_engine(windowed(), block_size=4), make_prompts(30)
    sampling = SamplingParams(max_new_tokens=12, ignore_eos=True, seed=2)
    first = flat(engine.generate(prompts, sampling))[0]
    computed = engine.num_computed
    second = flat(engine.generate(prompts, sampling))[0]
    assert second.token_ids == first.token_ids
    assert engine.num_computed - computed == (30 - 28) + 11, "of 30 tokens 28 are in full blocks"


def test_the_prediction_of_memory_knows_windows(make_engine: MakeEngine) -> None:
    model, prompts = windowed(), make_prompts(20, 20)
    engine = make_engine(model, block_size=4, prefill_tokens=8)
    engine.generate(prompts, SamplingParams(max_new_tokens=60, ignore_eos=True))
    settings = RolloutSettings(block_size=4, prefill_tokens=8)
    predicted = engine_bytes(model, settings, torch.device("cpu"), num_sequences=2, num_tokens=80)
    tensors = [tensor for layer in engine._runner.cache.layers.values() for tensor in layer.values()]
    assert sum(tensor.numel() * tensor.element_size() for tensor in tensors) == predicted
    token = 2 * 2 * 8 * 4  # key and value of 2 kv heads of 8 numbers
    assert predicted == token * 4 * (2 * 20 + 2 * (3 + 1) + 2)


@pytest.mark.parametrize("limits", [
    {"cache_tokens": 100}, {"max_running": 3}, {"cache_tokens": 90, "max_running": 2},
    {"speculation": {"type": "ngram", "num_drafts": 5}},
    {"cache_tokens": 100, "kv_cache": {"type": "int4", "group": 4}},
], ids=str)  # fmt: skip
def test_the_prediction_of_memory_knows_the_limits_of_the_cache(
    limits: dict[str, Any], make_engine: MakeEngine
) -> None:
    model, prompts = windowed(), make_prompts(20, 20, 20, 20, 20, 20)
    options = {"block_size": 4, "prefill_tokens": 8, **limits}
    engine = make_engine(model, **options, share_prefixes=False)
    engine.generate(prompts, SamplingParams(max_new_tokens=60, ignore_eos=True))
    settings, sizes = RolloutSettings.model_validate(options), {"num_sequences": 6, "num_tokens": 80}
    predicted = engine_bytes(model, settings, torch.device("cpu"), **sizes)
    assert predicted == engine._runner.cache_bytes
    assert predicted <= engine_bytes(model, RolloutSettings(block_size=4), torch.device("cpu"), **sizes)


def test_the_prediction_of_memory_has_what_is_swapped_into_it() -> None:
    """As much as the store may take, at most what all sequences need, and nothing where none of them gives way."""
    model, sizes = windowed(), {"num_sequences": 4, "num_tokens": 80}
    cpu, gpu, every = torch.device("cpu"), torch.device("cuda"), {"block_size": 4, "merge_lora": False}

    def predicted(device: torch.device, **settings: Any) -> int:
        return engine_bytes(model, RolloutSettings.model_validate(every | settings), device, **sizes)

    limited = predicted(cpu, cache_tokens=100)
    assert predicted(cpu, cache_tokens=100, preemption="swap", swap_gib=2**-20) == limited + 1024
    assert predicted(cpu, cache_tokens=100, preemption="swap") == limited + predicted(cpu)
    assert predicted(cpu, preemption="swap") == predicted(cpu)
    on_gpu = {"cache_tokens": 256, "block_size": 128}
    assert predicted(gpu, **on_gpu, preemption="swap") == predicted(gpu, **on_gpu), "a store on the host"
