"""Beam search: against all completions of a tiny vocabulary, against `transformers`, and by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import RolloutSettings
from alignlab.errors import RolloutError
from alignlab.rollout.embedded.beams import (
    BeamParams,
    Continuation,
    Finished,
    continuations,
    likeliest_needed,
    split,
)
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.search import Row
from alignlab.types import Prompt
from tests.models.attention_kinds import make_model
from tests.rollout.conftest import SIZES, VOCAB, MakeEngine, full_logprobs, make_prompts

END = 3
SMALL = 6


@pytest.fixture
def tiny() -> PreTrainedModel:
    torch.manual_seed(4)
    config = LlamaConfig(**SIZES, vocab_size=SMALL, eos_token_id=END, attn_implementation="alignlab")
    return LlamaForCausalLM(config).eval()


def exhaustive(model: PreTrainedModel, prompt: tuple[int, ...], length: int, penalty: float) -> list[tuple]:
    """Score and tokens of every completion, the best one first."""
    found = []
    for size in range(1, length + 1):
        for tokens in itertools.product(range(SMALL), repeat=size):
            ends = tokens[-1] == END
            if END in tokens[:-1] or (size < length and not ends):
                continue
            rows = full_logprobs(model, (*prompt, *tokens))[len(prompt) - 1 : -1]
            total = float(rows.gather(1, torch.tensor(tokens)[:, None]).sum())
            found.append((total / size**penalty, tokens))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty", [0.0, 1.0, -0.7, 2.0])
def test_wide_beams_find_the_best_of_all_completions(
    penalty: float, tiny: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    engine = EmbeddedEngine(tiny, tokenizer, RolloutSettings(block_size=2))
    prompt = Prompt((1, 4, 2), "")
    params = BeamParams(num_beams=40, num_best=8, length_penalty=penalty, max_new_tokens=3)
    [result] = engine.beam_search([prompt], params)
    expected = exhaustive(tiny, prompt.token_ids, 3, penalty)[:8]
    assert [c.token_ids for c in result.rollout.completions] == [tokens for _, tokens in expected]
    assert result.scores == pytest.approx([score for score, _ in expected], abs=1e-5)
    for completion in result.rollout.completions:
        assert completion.finish_reason == ("stop" if completion.token_ids[-1] == END else "length")
        rows = full_logprobs(tiny, (*prompt.token_ids, *completion.token_ids))[2:-1]
        own = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        assert completion.raw_logprobs == completion.logprobs == pytest.approx(own.tolist(), abs=1e-5)
        assert completion.policy_versions == (0,) * len(completion.token_ids)
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks


@pytest.mark.parametrize("penalty", [0.5, 1.0])
@pytest.mark.parametrize("length", [5, 12])
def test_transformers_finds_the_same_beams(
    penalty: float, length: int, tokenizer: PreTrainedTokenizerFast, tiny: PreTrainedModel
) -> None:
    prompts = [Prompt((1, 4, 2), ""), Prompt((5, 5, 1, 0, 2, 4), ""), Prompt((2,), "")]
    engine = EmbeddedEngine(tiny, tokenizer, RolloutSettings(block_size=4))
    params = BeamParams(num_beams=4, num_best=4, length_penalty=penalty, max_new_tokens=length)
    config = LlamaConfig(**SIZES, vocab_size=SMALL, eos_token_id=END, attn_implementation="eager")
    peer: Any = LlamaForCausalLM(config).eval()
    peer.load_state_dict(tiny.state_dict())
    for prompt, result in zip(prompts, engine.beam_search(prompts, params), strict=True):
        ids = torch.tensor([prompt.token_ids])
        output = peer.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=4, num_return_sequences=4, do_sample=False,
            length_penalty=penalty, early_stopping="never", max_new_tokens=length, pad_token_id=0,
            output_scores=True, return_dict_in_generate=True,
        )
        expected = []
        for row in output.sequences[:, len(prompt.token_ids) :].tolist():
            expected.append(tuple(row[: row.index(END) + 1] if END in row else row))
        assert [c.token_ids for c in result.rollout.completions] == expected
        assert result.scores == pytest.approx(output.sequences_scores.tolist(), abs=1e-5)


SETTINGS: dict[str, dict[str, int]] = {
    "blocks of 1": {"block_size": 1}, "prompts in pieces": {"block_size": 4, "prefill_tokens": 3},
    "one prompt at a time": {"max_running": 6}, "little cache": {"cache_tokens": 132, "block_size": 4},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", ["llama", "dense", "sparse"])
def test_schedules_do_not_change_the_beams(
    kind: str, name: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model, prompts = request.getfixturevalue(kind), make_prompts(3, 17, 9)
    params = BeamParams(num_beams=6, num_best=3, num_groups=2, diversity=0.5, max_new_tokens=9)
    expected = make_engine(model).beam_search(prompts, params)
    engine = make_engine(model, **SETTINGS[name])
    for one, other in zip(expected, engine.beam_search(prompts, params), strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-5)
        for first, second in zip(one.rollout.completions, other.rollout.completions, strict=True):
            assert first.token_ids == second.token_ids
            assert (first.routing is None) == (kind != "sparse")
            if first.routing is not None and second.routing is not None:
                assert first.routing.shape[0] == len(one.rollout.prompt.token_ids) + len(first.token_ids)
                assert torch.equal(first.routing, second.routing)
    assert engine.num_preempted == 0
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks


def test_recurrent_layers_fork_too(tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("gated-deltanet", vocab_size=VOCAB, initializer_range=0.1)
    engine = EmbeddedEngine(model, tokenizer, RolloutSettings(block_size=4))
    for result in engine.beam_search(make_prompts(5, 9), BeamParams(num_beams=5, num_best=5, max_new_tokens=7)):
        assert len({c.token_ids for c in result.rollout.completions}) == 5
        for completion in result.rollout.completions:
            ids = (*result.rollout.prompt.token_ids, *completion.token_ids)
            rows = full_logprobs(model, ids)[len(result.rollout.prompt.token_ids) - 1 : -1]
            own = rows.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            assert completion.logprobs == pytest.approx(own.tolist(), abs=1e-4)


def test_one_beam_is_greedy(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    [result] = make_engine().beam_search(make_prompts(6), BeamParams(num_beams=1, max_new_tokens=8))
    ids = list(make_prompts(6)[0].token_ids)
    for token in result.rollout.completions[0].token_ids:
        assert token == int(full_logprobs(llama, ids)[-1].argmax())
        ids.append(token)


def test_groups_differ_where_one_group_of_beams_does_not(make_engine: MakeEngine) -> None:
    prompts = make_prompts(6, 11)

    def first_tokens(**kind: Any) -> list[int]:
        params = BeamParams(num_beams=4, num_best=4, max_new_tokens=6, **kind)
        results = make_engine().beam_search(prompts, params)
        return [len({c.token_ids[0] for c in result.rollout.completions}) for result in results]

    assert first_tokens(num_groups=4, diversity=50.0) == [4, 4]
    assert max(first_tokens()) < 4


def rows_of(logprobs: torch.Tensor, count: int) -> list[Row]:
    """The likeliest tokens of each row [K,V]."""
    likeliest = logprobs.topk(count)
    pairs = zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True)
    return [Row(tokens, values) for tokens, values in pairs]


def test_a_step_by_hand() -> None:
    logprobs = rows_of(torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -4.0, -3.0]]), 3)
    found = continuations(logprobs, [-1.0, -2.0], [], diversity=0.0, count=3)
    assert [(c.beam, c.token) for c in found] == [(0, 2), (0, 0), (1, 0)]
    assert [c.logprob for c in found] == pytest.approx([-1.5, -2.0, -2.1])
    assert [c.token_logprob for c in found] == pytest.approx([-0.5, -1.0, -0.1])
    # Two beams of earlier groups took token 2, one took 0: it costs 0.6 and 0.3, and totals stay the model's.
    found = continuations(logprobs, [-1.0, -2.0], [2, 0, 2], diversity=0.3, count=3)
    assert [(c.beam, c.token) for c in found] == [(0, 2), (0, 0), (1, 0)]
    found = continuations(logprobs, [-1.0, -2.0], [2, 2, 2], diversity=0.3, count=2)
    assert [(c.beam, c.token, round(c.logprob, 6)) for c in found] == [(0, 0, -2.0), (1, 0, -2.1)]
    impossible = rows_of(torch.tensor([[-torch.inf, 0.0]]), 2)
    assert [c.token for c in continuations(impossible, [0.0], [], diversity=0.0, count=2)] == [1]


@pytest.mark.parametrize("diversity", [0.0, 0.3, 50.0])
def test_as_many_of_the_likeliest_tokens_as_are_needed_decide_as_all_do(diversity: float) -> None:
    """The tokens that were taken are the likeliest ones, so that none fewer would do."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        logprobs = torch.randn(3, 40, generator=generator)
        taken, totals = logprobs[0].topk(5).indices.tolist(), [-0.5, -0.1, -2.0]
        whole, few = (
            continuations(rows_of(logprobs, count), totals, taken, diversity=diversity, count=4)
            for count in (40, likeliest_needed(4, len(taken)))
        )
        assert whole == few and len(few) == 4


def test_ends_count_among_the_best_alone_by_hand() -> None:
    rows = ((0, 7, -1.0), (0, 1, -2.0), (1, 7, -3.0), (1, 2, -4.0))
    found = [Continuation(beam, token, total, -1.0) for beam, token, total in rows]
    going_on, ends = split(found, 2, {7}, is_last=False)
    assert [c.logprob for c in going_on] == [-2.0, -4.0] and [c.logprob for c in ends] == [-1.0]
    assert split(found, 2, {7}, is_last=True) == ([], found[:2])


def test_the_end_of_a_search_by_hand() -> None:
    finished: Finished[str] = Finished(2, 1.0)
    finished.add(finished.score(-3.0, 3), "a")
    assert not finished.is_final(-99.0, 5, 10), "there is room for another"
    finished.add(finished.score(-4.0, 2), "b")
    finished.add(finished.score(-6.0, 4), "c")
    assert finished.items == [(-1.0, "a"), (-1.5, "c")]
    assert not finished.is_final(-14.0, 5, 10), "over ten tokens it may reach -1.4"
    assert finished.is_final(-16.0, 5, 10)
    plain: Finished[str] = Finished(1, 0.0)
    plain.add(plain.score(-3.0, 3), "a")
    assert plain.is_final(-3.5, 2, 9) and not plain.is_final(-2.5, 2, 9)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_beams": 0}, "beams.num_beams is 0, and must be from 1 to rollout.max_running"),
        ({"num_beams": 129}, "beams.num_beams is 129, and must be from 1 to rollout.max_running"),
        ({"num_best": 5}, "beams.num_best is 5, and must be from 1 to num_beams"),
        ({"num_groups": 3}, "beams.num_groups is 3, and must divide num_beams"),
        ({"num_groups": 2}, "beams.diversity is 0.0, and must be over 0 and finite with several groups"),
        ({"diversity": 1.0}, "beams.diversity is 1.0, and must be 0 with one group"),
        ({"length_penalty": float("nan")}, "beams.length_penalty is nan"),
        ({"max_new_tokens": 0}, "beams.max_new_tokens is 0"),
    ],
)
def test_wrong_parameters_are_named(wrong: dict[str, Any], message: str, make_engine: MakeEngine) -> None:
    with pytest.raises(RolloutError, match=message.replace("(", r"\(")):
        make_engine().beam_search(make_prompts(3), replace(BeamParams(), **wrong))


def test_beams_that_the_cache_does_not_hold_are_refused_at_once(make_engine: MakeEngine) -> None:
    engine = make_engine(cache_tokens=64, block_size=4)
    with pytest.raises(RolloutError, match="must hold that many completions of 40 tokens after a prompt of 9"):
        engine.beam_search(make_prompts(9), BeamParams(num_beams=8, max_new_tokens=40))
    assert engine.num_computed == 0
