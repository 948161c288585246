"""Pre-empted sequences on the host: what comes back is what went, and no token is computed twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignlab.config.rollout import RolloutSettings
from alignlab.data.packing import pack_rollouts
from alignlab.errors import ConfigError
from alignlab.loop.forward import PolicyForward
from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.policy import Policy
from alignlab.rollout.embedded.block_manager import BlockManager
from alignlab.rollout.embedded.block_pools import EXPIRED, BlockPools
from alignlab.rollout.embedded.cache_space import CacheSpace
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.sequence import Request, TokenSequence
from alignlab.rollout.embedded.state_cache import StateCache
from alignlab.rollout.embedded.swapping import SwapStore
from alignlab.types import Completion, Prompt, SamplingParams
from tests.models.attention_kinds import make_model
from tests.rollout.conftest import SIZES, VOCAB, MakeEngine, flat, make_prompts
from tests.rollout.embedded.test_kv_caches import CACHES
from tests.rollout.embedded.test_speculation import repetitive

SWAP: dict[str, Any] = {"preemption": "swap", "cache_tokens": 60, "block_size": 4, "prefill_tokens": 9}
SAMPLING = SamplingParams(n=3, max_new_tokens=16, ignore_eos=True, seed=3)
LENGTHS = (5, 17, 26, 17)


def assert_same(expected: Sequence[Completion], found: Sequence[Completion], *, atol: float = 1e-5) -> None:
    for one, other in zip(expected, found, strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.raw_logprobs, other.raw_logprobs, atol=atol, rtol=0)
        if one.routing is not None:
            assert other.routing is not None and torch.equal(one.routing, other.routing)
        if one.kv_record is not None:
            assert other.kv_record is not None and torch.equal(known_bits(one.kv_record), known_bits(other.kv_record))


def known_bits(record: Tensor) -> Tensor:
    """What is recorded of tokens, and zeros where nothing is."""
    return record * record[..., :1]


def assert_swapped(engine: EmbeddedEngine) -> None:
    """All that gave way came back, and nothing is left on the host or in use."""
    swap, metrics = engine._space.swap, engine.metrics()
    assert swap is not None and metrics["engine/swapped_out"] == metrics["engine/swapped_in"] > 0
    assert engine.num_preempted == metrics["engine/swapped_out"] and metrics["engine/swapped_out_bytes"] > 0
    assert (swap.held_bytes, swap._rows, swap._sequences) == (0, {}, {})
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks


@pytest.mark.parametrize("share", [True, False], ids=["shared", "each alone"])
@pytest.mark.parametrize("name", ["llama", "dense", "sparse"])
def test_what_was_computed_is_copied_and_not_computed_again(
    name: str, share: bool, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model, prompts = request.getfixturevalue(name), make_prompts(*LENGTHS)
    expected = make_engine(model).generate(prompts, SAMPLING)
    engine = make_engine(model, share_prefixes=share, **SWAP)
    assert_same(flat(expected), flat(engine.generate(prompts, SAMPLING)))
    assert_swapped(engine)
    again = make_engine(model, share_prefixes=share, **SWAP | {"preemption": "recompute"})
    again.generate(prompts, SAMPLING)
    assert engine.num_computed < again.num_computed
    if not share:
        assert engine.num_computed == 3 * (sum(LENGTHS) + len(LENGTHS) * 15)


@pytest.mark.parametrize("cache", CACHES)
def test_every_kind_of_cache_comes_back(cache: str, make_engine: MakeEngine, dense: PreTrainedModel) -> None:
    """Codes, scales, groups, windows, and the record of how the cache rounded."""
    dense.double()
    settings = SWAP | {"kv_cache": CACHES[cache], "block_size": 8, "cache_tokens": 80}
    prompts = make_prompts(*LENGTHS)
    expected = make_engine(dense, kv_cache=CACHES[cache], block_size=8).generate(prompts, SAMPLING)
    engine = make_engine(dense, share_prefixes=False, **settings)
    assert_same(flat(expected), flat(engine.generate(prompts, SAMPLING)), atol=2e-6)
    assert_swapped(engine)
    assert engine.num_computed == 3 * (sum(LENGTHS) + len(LENGTHS) * 15)


@pytest.mark.parametrize(
    "cache", [
        {"type": "evict", "heavy": 6, "recent": 4, "sinks": 1, "interval": 4, "observed": 4},
        {"type": "top_k", "tokens": 6},
    ], ids=lambda cache: str(cache["type"]),
)  # fmt: skip
def test_what_was_dropped_or_left_out_stays_so(
    cache: dict[str, Any], make_engine: MakeEngine, llama: PreTrainedModel
) -> None:
    """A sequence whose tokens are about to be dropped, or to move, when it gives way is computed again."""
    llama.double()
    prompts = make_prompts(*LENGTHS)
    expected = make_engine(llama, kv_cache=cache, block_size=4).generate(prompts, SAMPLING)
    engine = make_engine(llama, **SWAP, kv_cache=cache)
    assert_same(flat(expected), flat(engine.generate(prompts, SAMPLING)), atol=2e-6)
    metrics = engine.metrics()
    assert engine.num_preempted >= metrics["engine/swapped_out"] == metrics["engine/swapped_in"] > 0
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks


@pytest.mark.parametrize("cache", CACHES)
def test_caches_that_share_prompts_come_back(cache: str, make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    """Also a sequence that drops tokens, or whose blocks are taken, in the step in which another one moves."""
    llama.double()
    prompts = make_prompts(13, 40, 3, 26)
    sampling = SamplingParams(n=4, max_new_tokens=20, ignore_eos=True, seed=5)
    expected = make_engine(llama, kv_cache=CACHES[cache], block_size=8).generate(prompts, sampling)
    engine = make_engine(llama, **SWAP | {"kv_cache": CACHES[cache], "block_size": 8, "cache_tokens": 64})
    for _ in range(2):  # the second call finds prompts that the first one published
        assert_same(flat(expected), flat(engine.generate(prompts, sampling)), atol=2e-6)
        metrics = engine.metrics()  # a sequence whose tokens are to be dropped next is computed again
        assert metrics["engine/swapped_out"] == metrics["engine/swapped_in"] > 0


@pytest.mark.parametrize("kind", ["latent", "mixture-of-heads-and-experts", "shared-recurrent-and-latent"])
def test_latents_and_states_come_back(kind: str, make_engine: MakeEngine) -> None:
    model, prompts = make_model(kind, vocab_size=VOCAB, initializer_range=0.1), make_prompts(*LENGTHS)
    expected = make_engine(model).generate(prompts, SAMPLING)
    engine = make_engine(model, share_prefixes=False, **SWAP)
    assert_same(flat(expected), flat(engine.generate(prompts, SAMPLING)))
    assert_swapped(engine)
    assert engine.num_computed == 3 * (sum(LENGTHS) + len(LENGTHS) * 15)


def test_states_come_back_where_slots_are_few(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = make_model("gated-deltanet", vocab_size=VOCAB, initializer_range=0.1), make_prompts(*LENGTHS)
    expected = make_engine(model).generate(prompts, SAMPLING)
    monkeypatch.setattr(CacheSpace, "_num_slots", lambda self, sequences: 5)
    engine = make_engine(model, preemption="swap", prefill_tokens=5)
    assert_same(flat(expected), flat(engine.generate(prompts, SAMPLING)))
    assert_swapped(engine)
    states = engine._space.states
    assert states is not None and (states.num_slots, states.num_free) == (5, 4)


def test_dropped_tokens_stay_those_that_were_sampled_with(make_engine: MakeEngine) -> None:
    """A token computed again beside others may find another room with its experts; one that was copied has its own."""
    torch.manual_seed(2)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "capacity_factor": 0.75}
    model, prompts = new_model(SIZES | experts, vocab_size=VOCAB), make_prompts(*LENGTHS)
    gaps = {}
    for preemption in ("swap", "recompute"):
        engine = make_engine(model, **SWAP | {"preemption": preemption})
        rollouts = engine.generate(prompts, SAMPLING)
        assert engine.num_preempted > 0
        assert any((completion.routing < -1).any() for completion in flat(rollouts)), "some are dropped"
        [pack] = pack_rollouts(rollouts, budget=1 << 20)
        with torch.no_grad():
            output = PolicyForward()(Policy(model).eval(), pack)
        gaps[preemption] = (output.logprobs - pack.rollout_logprobs)[pack.completion_mask].abs().max().item()
    assert gaps["swap"] < 2e-5
    assert gaps["recompute"] > 1e-3, "the drops that are recorded are the latest, not those that were sampled with"


def test_without_room_on_the_host_sequences_are_computed_again(make_engine: MakeEngine) -> None:
    prompts = make_prompts(*LENGTHS)
    expected = make_engine().generate(prompts, SAMPLING)
    engine = make_engine(**SWAP, swap_gib=5000 / 2**30)
    assert_same(flat(expected), flat(engine.generate(prompts, SAMPLING)))
    assert 0 < engine.metrics()["engine/swapped_out"] < engine.num_preempted
    none = make_engine(**SWAP, swap_gib=1 / 2**30)
    assert_same(flat(expected), flat(none.generate(prompts, SAMPLING)))
    assert none.metrics()["engine/swapped_out"] == 0 < none.num_preempted


def test_log_probs_of_given_completions_go_on_where_they_were(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = make_model("kimi-linear", vocab_size=VOCAB, initializer_range=0.1), make_prompts(17, 2)
    rollouts = make_engine(model).generate(prompts, SamplingParams(n=4, max_new_tokens=7, seed=4, ignore_eos=True))
    monkeypatch.setattr(CacheSpace, "_num_slots", lambda self, sequences: 3)
    engine = make_engine(model, block_size=4, prefill_tokens=3, preemption="swap")
    for completion, logprobs in zip(flat(rollouts), engine.logprobs(rollouts), strict=True):
        torch.testing.assert_close(logprobs, torch.tensor(completion.raw_logprobs), atol=1e-5, rtol=0)
    assert_swapped(engine)


def test_drafts_change_nothing(make_engine: MakeEngine) -> None:
    prompts = repetitive(4)
    expected = make_engine().generate(prompts, SAMPLING)
    drafts = {"type": "ngram", "min_match": 1, "always": True}
    engine = make_engine(**SWAP | {"cache_tokens": 80}, speculation=drafts)
    assert_same(flat(expected), flat(engine.generate(prompts, SAMPLING)))
    assert_swapped(engine)
    assert engine.metrics()["engine/draft_steps_frac"] > 0


def test_an_interrupted_call_leaves_nothing_on_the_host(make_engine: MakeEngine) -> None:
    engine, prompts = make_engine(**SWAP), make_prompts(*LENGTHS)

    def interrupt(*_: int) -> None:
        if engine._space.swap is not None and engine._space.swap.held_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, SAMPLING, on_step=interrupt)
    assert engine._space.swap is not None and engine._space.swap.held_bytes == 0
    expected = make_engine().generate(prompts, SAMPLING)
    assert_same(flat(expected), flat(engine.generate(prompts, SAMPLING)))


class Bench:
    """A cache of one layer, with two sequences of 10 tokens, 8 of which they share."""

    def __init__(self, max_bytes: int) -> None:
        self.pools = BlockPools([None, 3], 4)
        self.pools.grow({None: 8, 3: 8})
        specs = {0: LayerCacheSpec.of_heads(1, 2, 2), 1: LayerCacheSpec.of_heads(1, 1, 1, window=3)}
        self.cache = PagedCache(specs, 4)
        self.cache.resize({None: 8, 3: 8})
        for layer, size in ((0, 2), (1, 1)):
            numbers = torch.arange(32.0 * size).view(32, 1, size) + 100 * layer
            self.cache.write(layer, torch.arange(32), {"key": numbers, "value": -numbers})
        self.swap = SwapStore(self.cache, StateCache({}, torch.float32), max_bytes)
        request = Request(Prompt((1,), ""), SamplingParams(), frozenset())
        self.first, self.second = (TokenSequence(request, key, list(range(11)), num_computed=10) for key in (0, 1))
        wide, narrow = self.pools.managers[None], self.pools.managers[3]
        for sequence in (self.first, self.second):
            sequence.tables = {
                None: [wide.allocate() for _ in range(3)] if sequence is self.first else [],
                3: [EXPIRED, narrow.allocate(), narrow.allocate()],
            }
        self.second.tables[None] = [*map(wide.share, self.first.tables[None][:2]), wide.allocate()]
        for sequence in (self.first, self.second):
            for index in range(2):
                self.pools.publish(sequence.tables, index, b"%d of %d" % (index, sequence.key))

    def leave(self, sequence: TokenSequence) -> bool:
        is_kept = self.swap.take_out(sequence, self.pools)
        self.pools.release(sequence.tables)
        sequence.tables = self.pools.empty_tables()
        return is_kept


WIDE, NARROW = 4 * 2 * 2 * 4, 4 * 2 * 4  # bytes of a block


def test_shared_blocks_are_kept_once() -> None:
    bench = Bench(1 << 20)
    assert bench.leave(bench.first) and bench.swap.held_bytes == 3 * WIDE + 2 * NARROW
    assert bench.leave(bench.second) and bench.swap.held_bytes == 4 * WIDE + 4 * NARROW
    bench.swap.forget(bench.first)
    assert bench.swap.held_bytes == 4 * WIDE + 4 * NARROW, "its memory holds blocks of the second"
    bench.swap.forget(bench.second)
    assert bench.swap.held_bytes == 0 and not bench.swap._rows


def test_a_sequence_finds_what_nobody_took_and_gets_the_rest() -> None:
    bench = Bench(1 << 20)
    blocks = {window: list(table) for window, table in bench.first.tables.items()}
    before = {window: [t.clone() for t in bench.cache.tensors_of(window)] for window in (None, 3)}
    bench.pools.managers[None].release(bench.second.tables[None][0])  # the second has left its first block
    assert bench.leave(bench.first)
    taken = [bench.pools.managers[None].allocate() for _ in range(bench.pools.managers[None].num_free)]
    assert blocks[None][0] in taken and blocks[None][1] not in taken
    for window in (None, 3):
        for tensor in bench.cache.tensors_of(window):
            tensor.index_fill_(0, torch.tensor([b for b in range(8) if b != blocks[None][1] or window]), 7.0)
    for block in taken:
        bench.pools.managers[None].release(block)
    absent = bench.swap.find(bench.first, bench.pools)
    assert absent == {None: 2, 3: 1} and bench.first.tables[None][1] == blocks[None][1]
    assert bench.first.tables[3] == [EXPIRED, blocks[3][1], EXPIRED], "a full block that nobody took"
    bench.swap.bring_back(bench.first, bench.pools, None)
    for window, table in bench.first.tables.items():
        for place, block in enumerate(table):
            if block != EXPIRED and (window is None or place == 2):
                for tensor, old in zip(bench.cache.tensors_of(window), before[window], strict=True):
                    assert torch.equal(tensor[block], old[blocks[window][place]])
    assert bench.swap.held_bytes == 0 and bench.first not in bench.swap


def test_a_store_that_is_full_takes_nothing() -> None:
    bench = Bench(3 * WIDE + 2 * NARROW)
    assert bench.leave(bench.first) and not bench.leave(bench.second)
    assert bench.second not in bench.swap and bench.swap.held_bytes == 3 * WIDE + 2 * NARROW
    smaller = Bench(3 * WIDE + 2 * NARROW - 1)
    assert not smaller.leave(smaller.first)


def test_a_block_is_unchanged_until_it_is_allocated_again() -> None:
    manager = BlockManager(2, 4)
    block = manager.allocate()
    stamp = manager.stamp(block)
    assert not manager.take_unchanged(block, stamp), "it is still written to"
    manager.publish(block, b"digest")
    manager.release(block)
    assert manager.take_unchanged(block, stamp) and manager.users(block) == 1 and manager.num_free == 1
    manager.release(block)
    assert {manager.allocate(), manager.allocate()} == {0, 1}
    manager.release(block)
    assert not manager.take_unchanged(block, stamp) and manager.users(block) == 0
    stamp = manager.stamp(block)
    manager.reset()
    assert not manager.take_unchanged(block, stamp)


def test_settings_that_do_not_go_with_each_other_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"swap_gib is 2\.0, and must stay 4\.0 with preemption: recompute"):
        RolloutSettings(swap_gib=2)
    with pytest.raises(ConfigError, match="preemption is 'swap', and must be recompute with speculation: mtp"):
        RolloutSettings.model_validate({"preemption": "swap", "speculation": {"type": "mtp"}})
