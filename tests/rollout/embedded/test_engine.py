"""The engine's completions are those of plain forward passes, whatever the engine does to be fast."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.model import LoraSettings
from alignlab.config.rollout import RolloutSettings
from alignlab.errors import RolloutError
from alignlab.models.adapters import add_lora
from alignlab.rollout.embedded import cache_space
from alignlab.rollout.embedded.cache_space import CacheSpace
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.types import Prompt, SamplingParams
from tests.reference import sampling as slow
from tests.rollout.conftest import END, VOCAB, MakeEngine, flat, full_logprobs, make_prompts

MODELS = ("llama", "dense", "sparse")
SCHEDULES: dict[str, dict] = {
    "blocks of 1": {"block_size": 1},
    "blocks of 7": {"block_size": 7},
    "prefill by 3": {"prefill_tokens": 3},
    "prefill by 1": {"prefill_tokens": 1, "block_size": 5},
    "few at a time": {"max_running": 3},
    "one at a time": {"max_running": 1},
    "tiny cache": {"cache_tokens": 64, "block_size": 4},
    "tiny cache, nothing shared": {"cache_tokens": 60, "block_size": 4, "share_prefixes": False},
    "nothing shared": {"share_prefixes": False},
    "all at once": {"cache_tokens": 60, "block_size": 2, "prefill_tokens": 5, "max_running": 6},
}


@pytest.mark.parametrize("name", MODELS)
def test_greedy_is_the_argmax_of_the_full_forward(
    name: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(name)
    prompts = make_prompts(1, 6, 16, 23)
    rollouts = make_engine(model).generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=20, ignore_eos=True))
    for prompt, completion in zip(prompts, flat(rollouts), strict=True):
        expected = list(prompt.token_ids)
        for _ in range(20):
            expected.append(int(full_logprobs(model, expected)[-1].argmax()))
        assert completion.token_ids == tuple(expected[len(prompt.token_ids) :])


@pytest.mark.parametrize("name", MODELS)
def test_sampled_tokens_and_logprobs_are_those_of_the_full_forward(
    name: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model: PreTrainedModel = request.getfixturevalue(name)
    sampling = SamplingParams(n=3, temperature=0.7, top_p=0.95, max_new_tokens=12, ignore_eos=True, seed=5)
    engine = make_engine(model)
    for rollout in engine.generate(make_prompts(4, 9), sampling):
        for completion in rollout.completions:
            token_ids = (*rollout.prompt.token_ids, *completion.token_ids)
            logprobs = full_logprobs(model, token_ids)[len(rollout.prompt.token_ids) - 1 : -1]
            for row, token, logprob, raw in zip(
                logprobs, completion.token_ids, completion.logprobs, completion.raw_logprobs, strict=True
            ):
                assert raw == pytest.approx(float(row[token]), abs=1e-5)
                expected = slow.distribution(row.tolist(), sampling)[token]
                assert logprob == pytest.approx(float(torch.tensor(expected).log()), abs=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", MODELS)
def test_blocks_chunks_and_preemption_do_not_change_the_result(
    name: str, schedule: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    prompts = make_prompts(5, 17, 32, 1, 17)
    sampling = SamplingParams(n=4, max_new_tokens=14, seed=3, ignore_eos=True)
    expected = make_engine(model).generate(prompts, sampling)
    engine = make_engine(model, **SCHEDULES[schedule])
    for one, other in zip(flat(expected), flat(engine.generate(prompts, sampling)), strict=True):
        assert one.token_ids == other.token_ids
        torch.testing.assert_close(one.raw_logprobs, other.raw_logprobs, atol=1e-5, rtol=0)
        if one.routing is not None:
            assert other.routing is not None and torch.equal(one.routing, other.routing)
    assert (engine.num_preempted > 0) == ("cache" in schedule or schedule == "all at once")
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks


def test_other_requests_do_not_change_the_result(make_engine: MakeEngine) -> None:
    prompts = make_prompts(5, 17, 30, 9)
    kinds = [
        SamplingParams(n=2, seed=1, max_new_tokens=20), SamplingParams(temperature=0.0, max_new_tokens=7),
        SamplingParams(n=3, seed=1, top_p=0.8, repetition_penalty=1.3),
        SamplingParams(seed=9, top_k=4, min_new_tokens=30),
    ]
    together = make_engine().generate(prompts, kinds)
    for prompt, sampling, rollout in zip(prompts, kinds, together, strict=True):
        alone = make_engine().generate([prompt], sampling)[0]
        assert [c.token_ids for c in alone.completions] == [c.token_ids for c in rollout.completions]


def test_a_prompt_is_computed_once_for_its_group(make_engine: MakeEngine) -> None:
    prompts = make_prompts(30, 21)
    engine = make_engine(block_size=8)
    engine.generate(prompts, SamplingParams(n=6, max_new_tokens=1))
    assert engine.num_computed == 30 + 21
    engine.generate(prompts, SamplingParams(n=6, max_new_tokens=1))
    assert engine.num_computed == 30 + 21 + (30 - 24) + (21 - 16)  # full blocks were found again
    engine.generate(make_prompts(19, seed=1), SamplingParams(n=6, max_new_tokens=3, ignore_eos=True))
    assert engine.num_computed == 51 + 11 + 19 + 6 * 2
    alone = make_engine(block_size=8, share_prefixes=False)
    alone.generate(prompts, SamplingParams(n=6, max_new_tokens=1))
    assert alone.num_computed == 6 * (30 + 21)


def test_sampled_tokens_are_not_computed_again_as_a_prompt(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    first = make_prompts(10)[0]
    sampling = SamplingParams(max_new_tokens=9, ignore_eos=True, seed=0)
    completion = flat(engine.generate([first], sampling))[0]
    before = engine.num_computed
    engine.generate([Prompt((*first.token_ids, *completion.token_ids), "")], replace(sampling, max_new_tokens=1))
    assert engine.num_computed == before + 3  # of 19 tokens 18 were cached, 16 of them in full blocks


def test_blocks_are_found_by_all_that_precedes_them(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    first, second, third = (prompt.token_ids for prompt in make_prompts(4, 4, 4))
    sampling = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
    engine.generate([Prompt(first + second + third, "")], sampling)
    for tokens in (second + third, third + second + first, first + third + second):
        cached = flat(engine.generate([Prompt(tokens, "")], sampling))[0]
        fresh = flat(make_engine(share_prefixes=False).generate([Prompt(tokens, "")], sampling))[0]
        assert cached.token_ids == fresh.token_ids
        torch.testing.assert_close(cached.raw_logprobs, fresh.raw_logprobs, atol=1e-5, rtol=0)


def test_new_weights_drop_the_prefix_cache(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    engine = make_engine(block_size=4)
    prompts, sampling = make_prompts(20), SamplingParams(temperature=0.0, max_new_tokens=5, ignore_eos=True)
    engine.generate(prompts, sampling)
    with torch.no_grad():
        for weight in llama.parameters():
            weight.mul_(1.1)
    engine.update_weights(4)
    assert engine._space.blocks.num_published == 0
    after = flat(engine.generate(prompts, sampling))[0]
    assert engine.num_computed == 2 * (20 + 4)
    assert after.token_ids == flat(make_engine().generate(prompts, sampling))[0].token_ids
    assert after.policy_versions == (4,) * 5


def test_different_prompts_get_different_random_numbers(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.lm_head.weight.zero_()  # every token equally likely after every prompt
    completions = flat(make_engine().generate(make_prompts(5, 5, 5), SamplingParams(seed=0, max_new_tokens=6)))
    assert len({c.token_ids for c in completions}) == 3
    assert all(lp == pytest.approx(-float(torch.tensor(float(VOCAB)).log())) for c in completions for lp in c.logprobs)


def test_the_models_own_end_tokens(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    llama.generation_config.eos_token_id = [3, 5]
    llama.config.eos_token_id = 7
    engine = make_engine()
    sampling = SamplingParams(n=60, temperature=3.0, seed=2, max_new_tokens=60)
    stopped = [c.token_ids[-1] for c in flat(engine.generate(make_prompts(4), sampling)) if c.finish_reason == "stop"]
    assert set(stopped) == {3, 5, 7, END}
    ignoring = flat(engine.generate(make_prompts(4), replace(sampling, ignore_eos=True)))
    assert all(len(c.token_ids) == 60 and c.finish_reason == "length" for c in ignoring)
    assert any(END in c.token_ids for c in ignoring)


def test_routing_is_that_of_the_full_forward(make_engine: MakeEngine, sparse: PreTrainedModel) -> None:
    from alignlab.models.decoder import hidden_states
    from alignlab.models.routing import RoutingRecord
    from alignlab.types import Segments

    engine = make_engine(sparse, block_size=4)
    sampling = SamplingParams(n=2, max_new_tokens=6, ignore_eos=True, seed=0)
    for rollout in engine.generate(make_prompts(9, 14), sampling) + engine.generate(make_prompts(9), sampling):
        for completion in rollout.completions:
            tokens = torch.tensor(rollout.prompt.token_ids + completion.token_ids)
            segments, record = Segments.single(len(tokens)), RoutingRecord()
            with torch.no_grad():
                hidden_states(sparse, tokens, segments.position_ids, segments, routing=record)
            assert completion.routing is not None
            assert torch.equal(completion.routing[:-1], record.stacked_choices()[:-1])
            assert (completion.routing[-1] == -1).all()
            assert not completion.routing.is_inference()


def test_on_step_gets_the_progress_after_each_step(make_engine: MakeEngine) -> None:
    progress: list[tuple[int, int]] = []
    sampling = SamplingParams(n=2, max_new_tokens=3, ignore_eos=True)
    make_engine().generate(make_prompts(4, 4), sampling, on_step=lambda *p: progress.append(p))
    assert progress == [(4, 0), (8, 0), (12, 4)]


@pytest.mark.parametrize(
    ("lengths", "settings", "message"),
    [
        ((5, 100), {}, r"prompt 1 has 100 tokens, and with max_new_tokens \(64\) must not exceed the model"),
        ((60,), {"cache_tokens": 100}, r"prompt 0 has 60 .* must not exceed rollout.cache_tokens \(100\); raise"),
        ((4, 0), {}, "prompt 1 has 0 tokens, and must have at least one"),
    ],
)
def test_prompts_that_cannot_fit_are_refused_before_work(
    lengths: tuple[int, ...], settings: dict, message: str, make_engine: MakeEngine
) -> None:
    engine = make_engine(**settings)
    with pytest.raises(RolloutError, match=message):
        engine.generate(make_prompts(*lengths), SamplingParams())
    assert engine.num_computed == 0


def test_too_little_memory_is_named(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine()
    monkeypatch.setattr(CacheSpace, "_block_limits", lambda self, needs, slots: dict.fromkeys(needs, 2))
    with pytest.raises(RolloutError, match="needs 80 tokens of cache, and half of the free memory holds 32"):
        engine.generate(make_prompts(10), SamplingParams())


def test_logits_that_are_not_finite_are_named(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    with torch.no_grad():
        llama.lm_head.weight[3, 0] = torch.nan
    engine = make_engine()
    with pytest.raises(RolloutError, match="the model's logits must be finite"):
        engine.generate(make_prompts(10), SamplingParams())


def test_switching_a_merged_adapter_off_is_refused(
    tokenizer: PreTrainedTokenizerFast, llama: PreTrainedModel
) -> None:
    policy = add_lora(llama, LoraSettings(rank=2))
    engine = EmbeddedEngine(policy, tokenizer, RolloutSettings())
    with policy.disable_adapter(), pytest.raises(RolloutError, match="changed since version 0"):
        engine.generate(make_prompts(3), SamplingParams())
    engine.generate(make_prompts(3), SamplingParams(max_new_tokens=2))


def test_seeds_of_one_prompt_do_not_move_each_other(make_engine: MakeEngine) -> None:
    [prompt] = make_prompts(6)
    kinds = [SamplingParams(seed=seed, max_new_tokens=8, ignore_eos=True) for seed in (3, 5)]
    together = flat(make_engine().generate([prompt, prompt], kinds))
    alone = [flat(make_engine().generate([prompt], kind))[0] for kind in kinds]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]


def test_running_out_of_memory_leaves_the_engine_whole(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, sampling = make_engine(block_size=4), SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
    engine.generate(make_prompts(8), sampling)
    with monkeypatch.context() as patch:
        patch.setattr(PagedCache, "write", lambda *_: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            engine.generate(make_prompts(50), sampling)
    assert len(flat(engine.generate(make_prompts(50), sampling))[0].token_ids) == 8


def test_a_token_beyond_the_vocabulary(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    engine = make_engine()
    with pytest.raises(RolloutError, match=rf"prompt 0 holds token {VOCAB}, and each must be from 0 to {VOCAB - 1}"):
        engine.generate([Prompt((1, VOCAB), "")], SamplingParams())
    llama.generation_config.eos_token_id = VOCAB + 5
    engine.generate(make_prompts(3), SamplingParams(max_new_tokens=4, min_new_tokens=4))


def test_an_interrupted_engine_is_usable(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    prompts, sampling = make_prompts(9, 20), SamplingParams(n=3, seed=1, max_new_tokens=10, ignore_eos=True)
    expected = [c.token_ids for c in flat(engine.generate(prompts, sampling))]

    def interrupt(tokens: int, sequences: int) -> None:
        if tokens > 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts, sampling, on_step=interrupt)
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks
    assert [c.token_ids for c in flat(engine.generate(prompts, sampling))] == expected


def test_a_cache_that_grows_frees_the_old_one_before_it_allocates(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(block_size=4)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
    engine.generate(make_prompts(8), sampling)
    old = weakref.ref(engine._runner.cache.layers[0]["key"])
    write, alive = PagedCache.write, []

    def watched_write(cache: PagedCache, *args: Any) -> Any:
        alive.append(old() is not None)
        return write(cache, *args)

    monkeypatch.setattr(PagedCache, "write", watched_write)
    engine.generate(make_prompts(50, 40, seed=1), sampling)
    assert alive and not any(alive)


def test_memory_that_torch_holds_without_using_it_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (10, 99)), ("memory_reserved", 7), ("memory_allocated", 4)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert cache_space._free_of_gpu(torch.device("cuda", 0)) == 13


def test_the_cache_grows_and_rest_frees_it(make_engine: MakeEngine) -> None:
    engine = make_engine(block_size=4)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True)
    small = flat(engine.generate(make_prompts(8), sampling))[0]
    computed, blocks = engine.num_computed, engine._space.blocks.num_blocks
    engine.generate(make_prompts(50, 40, seed=1), sampling)
    assert engine._space.blocks.num_blocks > blocks
    again = flat(engine.generate(make_prompts(8), sampling))[0]
    assert again.token_ids == small.token_ids
    engine.rest()
    assert engine._space.blocks.num_blocks == 0 and not engine._runner.cache.layers
    computed = engine.num_computed
    assert flat(engine.generate(make_prompts(8), sampling))[0].token_ids == small.token_ids
    assert engine.num_computed == computed + 8 + 7


def test_the_policy_trains_on_after_generating(make_engine: MakeEngine, dense: PreTrainedModel) -> None:
    dense.train()
    make_engine(dense).generate(make_prompts(5), SamplingParams(max_new_tokens=4))
    assert dense.training and dense.model.layers[0].training
    dense(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    assert all(weight.grad is not None for weight in dense.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16(name: str, make_engine: MakeEngine, request: pytest.FixtureRequest) -> None:
    model: PreTrainedModel = request.getfixturevalue(name).to(torch.bfloat16)
    sampling = SamplingParams(n=4, max_new_tokens=20, seed=0, ignore_eos=True)
    gaps = []
    for rollout in make_engine(model).generate(make_prompts(7, 30), sampling):
        for completion in rollout.completions:
            token_ids = (*rollout.prompt.token_ids, *completion.token_ids)
            logprobs = full_logprobs(model, token_ids)[len(rollout.prompt.token_ids) - 1 : -1]
            exact = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            gaps.append((exact - torch.tensor(completion.raw_logprobs)).abs())
    assert torch.cat(gaps).mean() < 0.08


LONG = SamplingParams(n=2, max_new_tokens=20, ignore_eos=True, seed=1)


def in_a_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_abandon_from_another_thread_stops_the_call_at_its_next_step(make_engine: MakeEngine) -> None:
    engine, num_tokens = make_engine(), []

    def abandon_at_the_third_step(tokens: int, _: int) -> None:
        num_tokens.append(tokens)
        if len(num_tokens) == 3:
            in_a_thread(engine.abandon)

    with pytest.raises(RolloutError, match="generation was abandoned"):
        engine.generate(make_prompts(4), LONG, on_step=abandon_at_the_third_step)
    assert num_tokens == [2, 4, 6]
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks


def test_abandon_does_not_touch_later_calls(make_engine: MakeEngine) -> None:
    engine = make_engine()
    engine.abandon()
    assert flat(engine.generate(make_prompts(4), LONG)) == flat(make_engine().generate(make_prompts(4), LONG))


def test_a_closed_engine_holds_no_memory_until_its_weights_are_updated(make_engine: MakeEngine) -> None:
    engine = make_engine()
    before = [c.token_ids for c in flat(engine.generate(make_prompts(4), LONG))]
    engine.close()
    engine.close()
    assert engine._runner.cache.layers == {}
    calls: list[Callable[[], object]] = [
        lambda: engine.generate(make_prompts(4), LONG), lambda: engine.logprobs([]),
        lambda: next(engine.stream(make_prompts(4)[0], SamplingParams())),
    ]
    for call in calls:
        with pytest.raises(RolloutError, match="engine was closed; update its weights before generating"):
            call()
    engine.update_weights(1)
    assert [c.token_ids for c in flat(engine.generate(make_prompts(4), LONG))] == before


def test_closing_while_a_call_is_in_flight_stops_it_and_frees_the_cache(make_engine: MakeEngine) -> None:
    engine = make_engine()
    with pytest.raises(RolloutError, match="generation was abandoned"):
        engine.generate(make_prompts(4), LONG, on_step=lambda *_: in_a_thread(engine.close))
    assert engine._runner.cache.layers == {}


def test_two_threads_cannot_generate_at_once(make_engine: MakeEngine) -> None:
    engine, errors = make_engine(), []

    def generate() -> None:
        with pytest.raises(RolloutError, match="is generating already") as error:
            engine.generate(make_prompts(4), LONG)
        errors.append(error)

    engine.generate(make_prompts(4), replace(LONG, max_new_tokens=1), on_step=lambda *_: in_a_thread(generate))
    assert len(errors) == 1
