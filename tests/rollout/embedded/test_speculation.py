"""Speculative decoding gives the completions of decoding token by token, and its drafts are counted and paid for."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import DraftModelSettings, NgramSettings, RolloutSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.models.decoder import hidden_states, output_head
from alignlab.models.hub.checkpoints import new_model
from alignlab.models.mtp import stream_of
from alignlab.rollout.embedded import speculation
from alignlab.rollout.embedded.draft_model import DraftModel, make_draft_model
from alignlab.rollout.embedded.drafts import NgramDrafter, NgramIndex
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.payoff import Payoff, StepCosts
from alignlab.rollout.embedded.sample_step import keep
from alignlab.rollout.embedded.sampler import Draw
from alignlab.rollout.embedded.sequence import Request, TokenSequence
from alignlab.rollout.embedded.speculation import NoSpeculation, Speculation
from alignlab.types import Prompt, SamplingParams, Segments
from tests.models.attention_kinds import make_model
from tests.rollout.conftest import END, SIZES, VOCAB, MakeEngine, flat, full_logprobs, make_prompts

NGRAM = {"type": "ngram", "min_match": 1, "max_match": 3, "num_drafts": 3, "always": True}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {}, "greedy": {"temperature": 0.0}, "cold": {"temperature": 0.3, "top_p": 0.9},
    "penalties": {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "temperature": 0.5},
    "bans": {"temperature": 0.3, "banned_token_ids": (5, 6), "logit_bias": ((9, 2.0),), "min_new_tokens": 20},
    "forced": {"temperature": 0.3, "forced_tokens": ((3, 7), (4, 8), (9, 7))},
}
SCHEDULES: dict[str, dict[str, int]] = {
    "as it is": {}, "blocks of 3": {"block_size": 3}, "few at a time": {"max_running": 3},
    "prompts in pieces": {"prefill_tokens": 3, "block_size": 4}, "tiny cache": {"cache_tokens": 72, "block_size": 4},
}


class Oracle:
    """Drafts that are right, but for one of them a round, as if a very good model had made them."""

    num_drafts = 4
    is_free = True

    def __init__(self, texts: dict[int, Sequence[int]], *, spoil: int | None = None) -> None:
        self.texts, self.spoil = texts, spoil

    def begin(self, sequences: Sequence[TokenSequence]) -> None: ...

    def end(self) -> None: ...

    def rest(self) -> None: ...

    def propose(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
        drafts = []
        for sequence in sequences:
            draft = list(self.texts[sequence.key][sequence.num_sampled :][: self.num_drafts])
            if self.spoil is not None and self.spoil < len(draft):
                draft[self.spoil] = (draft[self.spoil] + 1) % VOCAB
            drafts.append(draft)
        return drafts


def repetitive(count: int) -> list[Prompt]:
    """Prompts that repeat themselves."""
    return [Prompt((*prompt.token_ids, *prompt.token_ids, *prompt.token_ids[:3]), "")
            for prompt in make_prompts(*range(5, 5 + count))]  # fmt: skip


def with_drafts(engine: EmbeddedEngine, drafter: Any) -> EmbeddedEngine:
    engine._speculation = Speculation(drafter, always=True)
    return engine


def assert_same(one: Any, other: Any) -> None:
    for first, second in zip(flat(one), flat(other), strict=True):
        assert first.token_ids == second.token_ids
        assert first.text == second.text and first.finish_reason == second.finish_reason
        assert first.logprobs == pytest.approx(second.logprobs, abs=5e-5)  # divided by the temperature
        assert first.raw_logprobs == pytest.approx(second.raw_logprobs, abs=1e-5)
        assert len(first.policy_versions) == len(first.token_ids)
        if first.routing is not None:
            assert torch.equal(first.routing, second.routing)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_ngram_drafts_change_nothing(
    name: str, kind: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    sampling = SamplingParams(n=3, seed=3, max_new_tokens=30, **KINDS[kind])
    engine = make_engine(model, speculation=NGRAM)
    expected = make_engine(model).generate(repetitive(4), sampling)
    assert_same(expected, engine.generate(repetitive(4), sampling))
    assert engine._speculation.num_drafted > 0
    if kind == "cold":
        assert engine._speculation.num_accepted > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("name", "spoil"), [("dense", None), ("dense", 0), ("dense", 2), ("sparse", 2)])
def test_kept_and_dropped_drafts_change_nothing_whatever_the_schedule(
    name: str, spoil: int | None, schedule: str, make_engine: MakeEngine, request: pytest.FixtureRequest
) -> None:
    """Of drafts that are right until a place, those before it are kept, and what was computed after it is forgotten."""
    model, prompts = request.getfixturevalue(name), repetitive(3)
    sampling = SamplingParams(n=2, seed=3, max_new_tokens=18, ignore_eos=True)
    expected = make_engine(model).generate(prompts, sampling)
    engine = make_engine(model, **SCHEDULES[schedule], speculation={"type": "ngram", "num_drafts": 4})
    sequences = engine._sequences(prompts, [sampling] * 3)
    texts = {s.key: c.token_ids for s, c in zip(sequences, flat(expected), strict=True)}
    with_drafts(engine, Oracle(texts, spoil=spoil))
    assert_same(expected, engine.generate(prompts, sampling))
    drafted, accepted = engine._speculation.num_drafted, engine._speculation.num_accepted
    if spoil is None:
        assert accepted == drafted > 60
    elif spoil == 0:
        assert accepted == 0 < drafted
    else:
        assert 0.3 * drafted < accepted < drafted
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks
    assert_same(expected, make_engine(model, **SCHEDULES[schedule]).generate(prompts, sampling))


def test_blocks_of_drafts_are_not_found_by_others(make_engine: MakeEngine) -> None:
    """A block that holds a draft which was not kept must not be published under the draft's tokens."""
    sampling = SamplingParams(seed=3, max_new_tokens=16, ignore_eos=True)
    [prompt], engine = make_prompts(6), make_engine(block_size=2, speculation={"type": "ngram", "num_drafts": 4})
    [completion] = flat(make_engine().generate([prompt], sampling))
    key = engine._sequences([prompt], [sampling])[0].key
    with_drafts(engine, Oracle({key: completion.token_ids}, spoil=0)).generate([prompt], sampling)
    engine._speculation = NoSpeculation()
    ids = (*prompt.token_ids, *completion.token_ids)
    for place in range(7, len(ids)):
        wrong = Prompt((*ids[:place], (ids[place] + 1) % VOCAB, 5, 6), "")
        [cached] = flat(engine.generate([wrong], replace(sampling, max_new_tokens=2)))
        [fresh] = flat(make_engine().generate([wrong], replace(sampling, max_new_tokens=2)))
        assert cached.token_ids == fresh.token_ids
        assert cached.raw_logprobs == pytest.approx(fresh.raw_logprobs, abs=1e-5)


def test_streams_stops_and_grammars_are_those_without_drafts(make_engine: MakeEngine) -> None:
    engine = make_engine(speculation=NGRAM)
    for sampling in (
        SamplingParams(n=6, seed=1, max_new_tokens=40, temperature=0.4, stop=("e", "55")),
        SamplingParams(n=6, seed=1, max_new_tokens=40, regex="(ab|abc|b1){3,9}x"),
    ):
        expected = make_engine().generate(repetitive(2), sampling)
        assert_same(expected, engine.generate(repetitive(2), sampling))
        streamed = "".join(engine.stream(repetitive(2)[0], replace(sampling, n=1)))
        assert streamed == flat(expected)[0].text


def test_a_draft_after_which_nothing_may_follow_ends_the_call_only_if_it_is_sampled(make_engine: MakeEngine) -> None:
    """All tokens but `a` and `b` are banned, and after `a` both of them."""
    [prompt], engine = make_prompts(6), make_engine(speculation={"type": "ngram", "num_drafts": 4})
    others = tuple(sorted(set(range(VOCAB)) - {97, 98}))
    sampling = SamplingParams(seed=1, max_new_tokens=8, banned_token_ids=others, banned_words=("aa", "ab"))
    elsewhere = replace(sampling, logit_bias=((98, 100.0),))
    key = engine._sequences([prompt], [elsewhere])[0].key
    with_drafts(engine, Oracle({key: b"aaaaaaaa"}))
    expected = make_engine().generate([prompt], elsewhere)
    assert flat(expected)[0].text == "bbbbbbbb"
    assert_same(expected, engine.generate([prompt], elsewhere))
    assert engine._speculation.num_drafted > 0 == engine._speculation.num_accepted
    with pytest.raises(RolloutError, match=r"after 1 tokens .* leave no token that may follow"):
        engine.generate([prompt], replace(sampling, logit_bias=((97, 100.0),)))


def test_the_distribution_is_the_policys(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    """Chi-square of two tokens, the first of which is always drafted wrong or right."""
    with torch.no_grad():
        llama.lm_head.weight[6:] = 0.0
        llama.lm_head.weight[:6] *= 1.5
    prompt = make_prompts(5)[0]
    sampling = SamplingParams(
        n=2000, seed=1, max_new_tokens=3, ignore_eos=True, banned_token_ids=tuple(range(6, VOCAB))
    )
    engine = make_engine(max_running=2000, speculation=NGRAM)

    class Fixed(Oracle):
        def propose(self, sequences: Sequence[TokenSequence]) -> list[list[int]]:
            return [[2, 4] for _ in sequences]

    completions = flat(with_drafts(engine, Fixed({})).generate([prompt], sampling))
    counts = torch.zeros(6, 6)
    expected = torch.zeros(6, 6)
    for completion in completions:
        counts[completion.token_ids[1], completion.token_ids[2]] += 1
    for first in range(6):
        share = sum(c.token_ids[0] == first for c in completions)
        second = full_logprobs(llama, (*prompt.token_ids, first))[-1, :6].softmax(-1)
        for token in range(6):
            third = full_logprobs(llama, (*prompt.token_ids, first, token))[-1, :6].softmax(-1)
            expected[token] += share * float(second[token]) * third
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = 35
    assert statistic < degrees + 4 * math.sqrt(2 * degrees), statistic
    assert 0 < engine._speculation.num_accepted < engine._speculation.num_drafted


@pytest.fixture
def small() -> PreTrainedModel:
    torch.manual_seed(7)
    config = LlamaConfig(**SIZES | {"num_hidden_layers": 1}, vocab_size=VOCAB + 4, attn_implementation="alignlab")
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("schedule", ["as it is", "blocks of 3", "tiny cache"])
@pytest.mark.parametrize("draft", ["another model", "itself"])
def test_a_draft_model_changes_nothing(
    draft: str, schedule: str, llama: PreTrainedModel, small: PreTrainedModel, make_engine: MakeEngine
) -> None:
    sampling = SamplingParams(n=3, seed=3, max_new_tokens=15, temperature=0.8, top_k=50)
    prompts = make_prompts(5, 9, 7)
    expected = make_engine().generate(prompts, sampling)
    engine = make_engine(**SCHEDULES[schedule], speculation={"type": "ngram", "num_drafts": 3})
    room = RolloutSettings(**SCHEDULES[schedule] | {"cache_tokens": None})
    drafter = DraftModel(llama if draft == "itself" else small, room, 3, VOCAB)
    with_drafts(engine, drafter)
    for _ in range(2):
        assert_same(expected, engine.generate(prompts, sampling))
    drafted, accepted = engine._speculation.num_drafted, engine._speculation.num_accepted
    if draft == "itself":
        assert accepted > 0.9 * drafted > 0, "what ends a completion leaves drafts over"
    else:
        assert 0 <= accepted < drafted
    assert drafter._space.blocks.num_free == drafter._space.blocks.num_blocks


def test_a_draft_model_forgets_what_was_not_kept(llama: PreTrainedModel, make_engine: MakeEngine) -> None:
    """After wrong drafts and a step without any, the drafts of the policy itself are right again."""
    engine, drafter = make_engine(), DraftModel(llama, RolloutSettings(block_size=4), 3, VOCAB)
    with_drafts(engine, drafter)
    draw, propose, accepted = drafter._sampler.draw, drafter.propose, [0]

    def in_turn(sequences: Sequence[TokenSequence]) -> list[list[int]]:
        accepted.append(engine._speculation.num_accepted)
        kind = len(accepted) % 3
        drafter._sampler.draw = (  # type: ignore[method-assign]
            draw if kind == 1 else lambda *args: [Draw((d.token + 1) % VOCAB, *d[1:]) for d in draw(*args)]
        )
        drafts = propose(sequences) if kind != 0 else []
        return drafts if kind == 1 else [[] for _ in sequences]

    drafter.propose = in_turn  # type: ignore[method-assign]
    engine.generate(make_prompts(9), SamplingParams(seed=2, max_new_tokens=61, ignore_eos=True))
    gains = [after - before for before, after in itertools.pairwise(accepted[1:])]
    assert gains[2::3] == [3] * len(gains[2::3]) and len(gains) > 20 and sum(gains) == 3 * len(gains[2::3])


def test_a_draft_model_is_not_rounded(llama: PreTrainedModel) -> None:
    """`exact` names layers of the policy, and a model in float64 could not be rounded at all."""
    settings = RolloutSettings(quantization={"type": "int8", "exact": ["down_proj"]})
    assert DraftModel(llama.double(), settings, 3, VOCAB)._weights.rounding is None


def test_a_draft_model_computes_each_token_once(llama: PreTrainedModel, make_engine: MakeEngine) -> None:
    sampling = SamplingParams(seed=3, max_new_tokens=13, ignore_eos=True)
    engine = make_engine()
    drafter = DraftModel(llama, RolloutSettings(), 3, VOCAB)
    computed: list[int] = []
    hidden = drafter._runner.hidden
    drafter._runner.hidden = lambda step, others=(): (  # type: ignore[method-assign]
        computed.append(sum(work.count for work in step.work)) or hidden(step, others)
    )
    with_drafts(engine, drafter).generate(make_prompts(8), sampling)
    # The prompt's pass gives one token; then rounds of 3 drafts and one more: 1 + 3 x 4 tokens.
    assert computed == [9, 1, 1, 2, 1, 1, 2, 1, 1]
    assert engine.num_computed == 8 + 3 * 4


@pytest.fixture
def ahead() -> PreTrainedModel:
    torch.manual_seed(3)
    return new_model({**SIZES, "num_mtp_layers": 1}, vocab_size=VOCAB)


def mtp_guess(model: Any, ids: Sequence[int]) -> int:
    """The likeliest token after the next, by the layer as it is trained."""
    segments, tokens = Segments.single(len(ids)), torch.tensor(ids)
    with torch.no_grad():
        states = hidden_states(model, tokens, segments.position_ids, segments)
        stream = stream_of(segments)
        assert stream is not None
        embeddings = model.model.embedded(tokens[stream.tokens])
        hidden = model.mtp(states[stream.predecessors], embeddings, stream, model.model)
        return int((hidden[-1] @ output_head(model)[0].T).argmax())


@pytest.mark.parametrize(
    ("schedule", "num_drafts"), [("as it is", 1), ("few at a time", 3), ("prompts in pieces", 3)]
)
def test_mtp_drafts_change_nothing(
    schedule: str, num_drafts: int, ahead: PreTrainedModel, make_engine: MakeEngine
) -> None:
    sampling = SamplingParams(n=3, seed=3, max_new_tokens=10, temperature=0.3)
    prompts = [*make_prompts(3, 9, 1), *repetitive(1)]
    expected = make_engine(ahead).generate(prompts, sampling)
    settings = {"type": "mtp", "num_drafts": num_drafts, "always": True}
    engine = make_engine(ahead, **SCHEDULES[schedule] | {"cache_tokens": 400}, speculation=settings)
    for _ in range(2):
        assert_same(expected, engine.generate(prompts, sampling))
    assert_same(expected[:1], engine.generate(prompts[:1], sampling))  # as many forks as tokens of the prompt
    assert engine._speculation.num_drafted > 0


def test_mtp_guesses_what_it_was_trained_to(ahead: PreTrainedModel, make_engine: MakeEngine) -> None:
    """Greedy drafts are the likeliest tokens of the layer, wherever the prompt was computed and whatever was kept."""
    settings = {"type": "mtp", "num_drafts": 3, "always": True}
    engine, drafts = make_engine(ahead, block_size=4, prefill_tokens=6, speculation=settings), []
    drafter = engine._speculation._drafter
    propose = drafter.propose

    def noted(sequences: Sequence[TokenSequence]) -> list[list[int]]:
        tokens = [list(sequence.token_ids) for sequence in sequences]
        proposals = propose(sequences)
        drafts.extend((ids, proposal[0]) for ids, proposal in zip(tokens, proposals, strict=True) if proposal)
        return proposals

    drafter.propose = noted  # type: ignore[method-assign]
    engine.generate(make_prompts(9, 4, 17), SamplingParams(n=2, temperature=0.0, max_new_tokens=9, ignore_eos=True))
    assert len(drafts) > 20
    for ids, guess in drafts:
        assert guess == mtp_guess(ahead, ids)


def test_ngrams_by_hand() -> None:
    index = NgramIndex(2, 3)
    text = [1, 2, 3, 4, 9, 2, 3, 5]
    index.add(text, 0, len(text))
    assert index.continued([7, 2, 3], 2) == [5], "the latest place, as far as its text goes"
    assert index.continued([1, 2, 3], 3) == [4, 9, 2], "the longest match comes first"
    assert index.continued([3, 2], 3) == [] and index.continued([2], 3) == []
    other = [8, 2, 3, 6, 6]
    index.add(other, 2, len(other))
    assert index.continued([0, 2, 3], 2) == [6, 6]


def test_drafts_come_from_the_prompt_the_text_and_the_group() -> None:
    request = Request(Prompt((1, 2, 3, 4), ""), SamplingParams(n=2), frozenset())
    one, two = (TokenSequence(request, key, [1, 2, 3, 4]) for key in (0, 1))
    drafter = NgramDrafter(3, 2, 3)
    drafter.begin([one, two])
    one.token_ids += [2, 3]
    assert drafter.propose([one]) == [[4, 2, 3]]
    two.token_ids += [7, 8, 9, 5]
    assert drafter.propose([one, two]) == [[4, 2, 3], []]
    one.token_ids += [7, 8]
    assert drafter.propose([one]) == [[9, 5]], "what the other wrote after the same tokens"
    other = TokenSequence(replace(request), 2, [7, 8])
    assert drafter.propose([other]) == [[]], "groups do not mix"


def sequence_with(drafts: list[int], **sampling: Any) -> TokenSequence:
    request = Request(Prompt((1, 2), ""), SamplingParams(**sampling), frozenset([END]))
    sequence = TokenSequence(request, 0, [1, 2, 3], logprobs=[0.0], raw_logprobs=[0.0], versions=[0])
    sequence.add_drafts(drafts)
    sequence.num_computed = len(sequence.token_ids)
    return sequence


def test_keeping_by_hand() -> None:
    def kept(drafts: list[int], drawn: list[int], **sampling: Any) -> tuple[int, list[int], int]:
        sequence = sequence_with(drafts, **sampling)
        count = keep(sequence, [Draw(token, -1.0, -2.0) for token in drawn], 7)
        assert sequence.num_drafts == 0 and len(sequence.logprobs) == len(sequence.token_ids) - 2
        assert sequence.versions[1:] == [7] * (len(sequence.versions) - 1)
        return count, sequence.token_ids[3:], sequence.num_computed

    assert kept([5, 6, 7], [5, 6, 8, 9]) == (2, [5, 6, 8], 5)
    assert kept([5, 6], [5, 6, 8]) == (2, [5, 6, 8], 5)
    assert kept([5, 6], [4, 6, 8]) == (0, [4], 3)
    assert kept([], [4]) == (0, [4], 3)
    assert kept([END, 6], [END, 6, 8]) == (1, [END], 3)
    assert kept([5, 6, 7], [5, 6, 7, 8], max_new_tokens=3) == (2, [5, 6], 4)


def test_the_cost_of_a_step_is_a_line_through_medians() -> None:
    costs = StepCosts()
    assert costs.line() is None
    for num_tokens in (1, 3, 5):
        for noise in (0.0, 0.0, 50.0):  # of three steps one was slow
            costs.add(num_tokens, 10 + 2 * num_tokens + noise)
    costs.add(7, 1000.0)
    assert costs.line() == pytest.approx((10.0, 2.0))
    assert costs.knows(3) and not costs.knows(7) and not costs.knows(2)


def payoff_of(base: float, slope: float, *, is_free: bool = True) -> Payoff:
    payoff = Payoff(is_free=is_free)
    for num_tokens in (1, 2, 4, 8, 16):
        for _ in range(3):
            payoff.record_step(num_tokens, base + slope * num_tokens)
    payoff.asks()
    return payoff


def test_a_draft_is_as_long_as_its_tokens_pay_by_hand() -> None:
    """At the rate 1/2 the i-th token is right with 1/2**i; it costs 1 and is worth 9 + 1 alone, (9 + 4) / 4 in four."""
    one = sequence_with([])
    payoff = payoff_of(9.0, 1.0)
    assert payoff.lengths([one], [[5] * 9]) == [3]  # 10 / 8 > 1 > 10 / 16
    rows = [sequence_with([]) for _ in range(4)]
    assert payoff.lengths(rows, [[5] * 9, [], [5], [5, 6]]) == [1, 0, 1, 1]  # 13 / 4 / 2 > 1 > 13 / 4 / 4
    assert payoff_of(0.0, 1.0).lengths([one], [[5] * 9]) == [0]
    payoff.record_proposals(100.0)
    assert payoff.lengths([one], [[5] * 9]) == [0], "the proposals themselves cost more than they bring"


def test_agreement_is_learnt_from_drafts_that_were_not_computed() -> None:
    payoff, good, bad = payoff_of(9.0, 1.0), sequence_with([]), sequence_with([])
    for _ in range(20):
        payoff.record_tokens(good, [5, 6, 7], [5])
        payoff.record_tokens(bad, [5, 6, 7], [4])
    assert payoff.lengths([good], [[5] * 9]) == [9]
    assert payoff.lengths([bad], [[5] * 9]) == [0]
    for _ in range(20):
        payoff.record_tokens(bad, [5, 6, 7], [5, 6, 9])
    assert 1 < payoff.lengths([bad], [[5] * 9])[0] < 9


def test_proposals_that_cost_and_do_not_pay_are_seldom_made() -> None:
    one = sequence_with([])
    payoff = payoff_of(0.0, 1.0, is_free=False)
    assert payoff.asks() and payoff.lengths([one], [[5]]) == [0]
    assert sum(payoff.asks() for _ in range(128)) == 4
    free = payoff_of(0.0, 1.0)
    assert free.lengths([one], [[5]]) == [0] and free.asks()


def test_drafts_that_do_not_pay_stop(make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock in which every computed row takes a second."""
    clock = [0.0]
    monkeypatch.setattr(speculation, "perf_counter", lambda: clock[0])
    engine = make_engine(speculation=NGRAM | {"always": False})
    hidden = engine._runner.hidden

    def timed(step: Any, others: Any = ()) -> Any:
        clock[0] += sum(work.count for work in step.work)
        return hidden(step, others)

    engine._runner.hidden = timed  # type: ignore[method-assign]
    engine.generate([Prompt((1, 2, 3, 1, 2, 3, 1, 2), "")], SamplingParams(
        temperature=3.0, max_new_tokens=100, ignore_eos=True, seed=1))  # fmt: skip
    share = engine.metrics()["engine/draft_steps_frac"]
    assert 0 < share < 0.1
    assert 0 <= engine.metrics()["engine/draft_acceptance"] < 0.3


@pytest.mark.parametrize("pays", [True, False])
@pytest.mark.parametrize("kind", ["model", "mtp"])
def test_drafts_of_models_go_on_and_off_by_what_they_gain(
    kind: str, pays: bool, llama: PreTrainedModel, ahead: PreTrainedModel, make_engine: MakeEngine,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By a clock: a step of the policy takes 1 s and a little a row; of the drafts 0.01 s, or as much as the policy's.
    """
    clock = [0.0]
    monkeypatch.setattr(speculation, "perf_counter", lambda: clock[0])

    def take_time(runner: Any, seconds: float) -> None:
        hidden = runner.hidden

        def timed(step: Any, others: Any = ()) -> Any:
            clock[0] += seconds * (1 + 0.01 * sum(work.count for work in step.work))
            return hidden(step, others)

        runner.hidden = timed

    policy = llama if kind == "model" else ahead
    engine = make_engine(policy, speculation={"type": "mtp" if kind == "mtp" else "ngram"})
    drafter = DraftModel(llama, RolloutSettings(), 2, VOCAB) if kind == "model" else engine._speculation._drafter
    engine._speculation = Speculation(drafter, always=False)
    take_time(engine._runner, 1.0)
    take_time(drafter._runner, 0.01 if pays else 1.0)
    # The draft model is the policy itself; the layer was never trained, and is right where the policy has no choice.
    sampling = SamplingParams(max_new_tokens=100, ignore_eos=True, seed=1, temperature=0.5)
    if kind == "mtp" and pays:
        sampling = replace(sampling, banned_token_ids=tuple(range(1, VOCAB)))
    engine.generate(make_prompts(5), sampling)
    metrics = engine.metrics()
    if pays:
        assert metrics["engine/draft_steps_frac"] > 0.7 and metrics["engine/draft_acceptance"] > 0.9
    else:
        assert 0 < metrics["engine/draft_steps_frac"] < 0.2


def test_what_cannot_be_is_named(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, make_engine: MakeEngine, tmp_path: Path,
    small: PreTrainedModel, monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.speculation is ngram, and must be null for a model with recurr"):
        make_engine(make_model("gated-deltanet", vocab_size=VOCAB), speculation=NGRAM)
    monkeypatch.setattr(speculation, "can_be_recorded", lambda *_: True)
    with pytest.raises(ConfigError, match=r"rollout\.cuda_graphs must then be false"):
        make_engine(speculation=NGRAM)
    make_engine(speculation=NGRAM, cuda_graphs=False)
    with pytest.raises(ConfigError, match="the model must have a layer for multi-token prediction"):
        make_engine(speculation={"type": "mtp"}, cuda_graphs=False)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="min_match is 5, and must be at most max_match"):
        NgramSettings(min_match=5)
    small.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    chosen = DraftModelSettings(model=str(tmp_path))
    drafter = make_draft_model(chosen, RolloutSettings(), llama, tokenizer, VOCAB)
    assert drafter.num_drafts == 4
    with pytest.raises(RolloutError, match="the draft model has 128 positions, and a prompt with its completion 150"):
        drafter.begin([sequence_with([], max_new_tokens=148)])
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<end>")
    other.add_tokens(["<more>"])
    other.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"rollout\.speculation\.model is .*, and must have the policy's tokenizer"):
        make_draft_model(chosen, RolloutSettings(), llama, tokenizer, VOCAB)
