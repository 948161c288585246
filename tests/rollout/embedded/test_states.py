"""States of sequences in the embedded engine: slots, forks, states of prompts that are found again, and memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from alignlab.errors import RolloutError
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.rollout.embedded.block_pools import BlockPools
from alignlab.rollout.embedded.cache_space import CacheSpace
from alignlab.rollout.embedded.scheduler import Scheduler, Work
from alignlab.rollout.embedded.sequence import Request, TokenSequence
from alignlab.rollout.embedded.state_slots import ZERO, StateSlots, StateUse, slots_needed
from alignlab.rollout.embedded.step_plan import state_slots
from alignlab.rollout.embedded.tile_plan import plan_tiles
from alignlab.types import Prompt, SamplingParams
from tests.models.attention_kinds import make_model
from tests.rollout.conftest import VOCAB, MakeEngine, flat, full_logprobs, make_prompts

HYBRIDS = pytest.mark.parametrize("kind", ["gated-deltanet", "qwen3-next", "kimi-linear"])


def model_of(kind: str) -> PolicyForCausalLM:
    return make_model(kind, vocab_size=VOCAB, initializer_range=0.1)


def sequence(*token_ids: int, n: int = 1) -> TokenSequence:
    request = Request(Prompt(token_ids, ""), SamplingParams(n=n, max_new_tokens=4), frozenset())
    return TokenSequence(request, 0, list(token_ids))


def assert_close(ours: Any, others: Any) -> None:
    for mine, other in zip(flat(ours), flat(others), strict=True):
        assert mine.token_ids == other.token_ids
        torch.testing.assert_close(mine.raw_logprobs, other.raw_logprobs, atol=1e-5, rtol=0)


def test_a_slot_is_written_in_place_unless_others_read_it() -> None:
    slots, first, second = StateSlots(), sequence(1), sequence(2)
    slots.grow(5)
    assert slots.num_free == 4 and slots.begin(first) == StateUse(ZERO, 1)
    assert slots.missing(first) == 0 and slots.begin(first) == StateUse(1, 1)
    slots.fork(first, second)
    assert slots.missing(first) == 1 and slots.begin(second) == StateUse(1, 2)
    assert slots.missing(first) == 0, "the other reads its own now"
    slots.publish(first, b"digest")
    assert slots.missing(first) == 1 and slots.begin(first) == StateUse(1, 3)
    third = sequence(3)
    slots.take(third, b"digest")
    assert slots.begin(third) == StateUse(1, 4), "a published state stays as it is"
    for user in (first, second, third):
        slots.release(user)
    assert slots.num_free == 4 and slots.knows(b"digest")
    slots.forget_all()
    assert not slots.knows(b"digest")


def test_the_zero_slot_is_nobodys_after_a_reset() -> None:
    slots = StateSlots()
    slots.grow(3)
    slots.begin(sequence(1))
    slots.reset()
    assert (slots.num_slots, slots.num_free) == (3, 2)
    assert slots.begin(sequence(1)).write != ZERO


def test_added_rows_have_a_slot_of_their_own() -> None:
    works = [Work(sequence(1, 2), 0, 2, 0, StateUse(0, 1))]
    works += [Work(sequence(3), 0, 1, 1, StateUse(i, i)) for i in (2, 3)]
    assert state_slots(works).tolist() == [[0, 2, 3], [1, 2, 3]]  # type: ignore[union-attr]
    for work in works:
        work.sequence.tables = {None: [0]}
    step = plan_tiles(works, block_size=16, num_blocks={None: 4}, max_rows=4, num_slots=9)
    assert step.state_slots is not None and step.state_slots.tolist() == [[2, 3, 9, 9, 0], [2, 3, 9, 9, 1]]


def test_states_are_kept_at_the_end_of_a_prompts_last_full_block() -> None:
    pools, slots = BlockPools([None], 4), StateSlots()
    pools.grow({None: 40})
    slots.grow(10)
    scheduler = Scheduler(pools, root=b"", max_running=4, prefill_tokens=32, states=slots)
    scheduler.add([sequence(*range(11))])  # logits are needed after token 10: two full blocks before
    counts = []
    while not scheduler.running or scheduler.running[0].num_pending:
        step = scheduler.schedule()
        counts.append([work.count for work in step.work])
        scheduler.commit(step)
    assert counts == [[8], [3]]
    again = sequence(*range(11))
    scheduler.add([again])
    step = scheduler.schedule()
    assert [(work.sequence is again, work.start, work.count) for work in step.work] == [(True, 8, 3)]


@HYBRIDS
def test_a_prompt_that_was_computed_before_is_taken_from_its_state(kind: str, make_engine: MakeEngine) -> None:
    model, prompts = model_of(kind), make_prompts(23, 9, 3)
    sampling = SamplingParams(n=2, max_new_tokens=6, seed=1, ignore_eos=True)
    engine = make_engine(model, block_size=4)
    results, computed = [], [0]
    for _ in range(3):
        results.append(engine.generate(prompts, sampling))
        computed.append(engine.num_computed)
    decoded = 3 * 2 * 5
    assert computed[1] == 23 + 9 + 3 + decoded
    # The states after 20 and 8 tokens were kept, that of the prompt of 3 tokens was not.
    assert computed[2] - computed[1] == computed[3] - computed[2] == 3 + 1 + 3 + decoded
    assert_close(results[0], results[1])
    assert_close(results[0], results[2])
    assert_close(make_engine(model, share_prefixes=False).generate(prompts, sampling), results[0])


@HYBRIDS
def test_sequences_give_way_where_slots_are_few(
    kind: str, make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = model_of(kind), make_prompts(5, 17, 8, 1)
    sampling = SamplingParams(n=4, max_new_tokens=9, seed=3, ignore_eos=True)
    expected = make_engine(model).generate(prompts, sampling)
    monkeypatch.setattr(CacheSpace, "_num_slots", lambda self, sequences: 5)
    engine = make_engine(model, prefill_tokens=5)
    assert_close(engine.generate(prompts, sampling), expected)
    assert engine.num_preempted > 0
    states = engine._space.states
    assert states is not None and (states.num_slots, states.num_free) == (5, 4)


def test_completions_that_gave_way_while_they_were_scored_are_scored_again(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = model_of("kimi-linear"), make_prompts(17, 2)
    rollouts = make_engine(model).generate(prompts, SamplingParams(n=4, max_new_tokens=7, seed=4, ignore_eos=True))
    monkeypatch.setattr(CacheSpace, "_num_slots", lambda self, sequences: 3)
    engine = make_engine(model, block_size=4, prefill_tokens=3)
    for completion, logprobs in zip(flat(rollouts), engine.logprobs(rollouts), strict=True):
        torch.testing.assert_close(logprobs, torch.tensor(completion.raw_logprobs), atol=1e-5, rtol=0)
    assert engine.num_preempted > 0


def test_states_of_older_weights_are_forgotten(make_engine: MakeEngine) -> None:
    model, prompts = model_of("qwen3-next"), make_prompts(19)
    sampling = SamplingParams(temperature=0.0, max_new_tokens=5, ignore_eos=True)
    engine = make_engine(model, block_size=4)
    engine.generate(prompts, sampling)
    with torch.no_grad():
        model.model.layers[0].linear_attn.in_proj_qkvz.weight.mul_(-1.5)
    engine.update_weights(1)
    [completion] = flat(engine.generate(prompts, sampling))
    rows = full_logprobs(model, (*prompts[0].token_ids, *completion.token_ids))[18:-1]
    torch.testing.assert_close(torch.tensor(completion.raw_logprobs), rows.max(-1).values, atol=1e-5, rtol=0)


def test_given_completions_are_scored_from_the_state_of_their_prompt(make_engine: MakeEngine) -> None:
    model, prompts = model_of("kimi-linear"), make_prompts(21, 6)
    engine = make_engine(model, block_size=4)
    rollouts = engine.generate(prompts, SamplingParams(n=3, max_new_tokens=7, seed=2, ignore_eos=True))
    engine = make_engine(model, block_size=4)
    for completion, logprobs in zip(flat(rollouts), engine.logprobs(rollouts), strict=True):
        torch.testing.assert_close(logprobs, torch.tensor(completion.raw_logprobs), atol=1e-5, rtol=0)
    # The prompts' full blocks once, the rest of the prompt and all but the last token for each completion.
    assert engine.num_computed == (20 + 3 * (1 + 6)) + (4 + 3 * (2 + 6))


def test_a_cache_for_less_than_one_sequence_is_refused(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(model_of("gated-deltanet"))
    free = SimpleNamespace(available=4 * engine._runner.states.slot_bytes)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    message = "recurrent layers keep .* holds 1 times that, where 3 are needed; free memory"
    with pytest.raises(RolloutError, match=message):
        engine.generate(make_prompts(4), SamplingParams(max_new_tokens=3))


def test_slots_are_enough_for_all_that_run() -> None:
    assert (slots_needed(1, 0), slots_needed(8, 2)) == (3, 12)
