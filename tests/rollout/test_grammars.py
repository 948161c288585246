"""Completions that match a regular expression or fit a JSON schema."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.errors import RolloutError
from alignlab.rollout.embedded.sequence import Request, TokenSequence
from alignlab.rollout.grammars import grammar_of
from alignlab.rollout.vllm.completions import make_requests
from alignlab.types import Prompt, SamplingParams
from tests.reference import sampling as slow
from tests.rollout.conftest import END, VOCAB, MakeEngine, flat, full_logprobs, make_prompts

SCHEMA = json.dumps(
    {
        "type": "object", "properties": {"name": {"enum": ["x", "yz"]}, "n": {"type": "integer", "maximum": 9}},
        "required": ["name", "n"], "additionalProperties": False,
    }
)


def allowed_of(state, ids: list[int]) -> list[int]:
    return np.unpackbits(state.allowed(ids), bitorder="little").nonzero()[0].tolist()


def test_tokens_that_may_follow_by_hand(tokenizer: PreTrainedTokenizerFast) -> None:
    grammar = grammar_of(SamplingParams(regex="ab?[01]"), tokenizer, VOCAB, [END])
    assert grammar is not None
    state = grammar.begin()
    assert allowed_of(state, []) == [97]
    assert allowed_of(state, [97]) == [48, 49, 98]
    assert allowed_of(state, [97, 98]) == [48, 49]
    assert allowed_of(state, [97, 49]) == [END], "a draft that was not accepted is taken back"
    assert state.allowed([97, 100]) is None
    assert state.allowed([97, 98, 100, 7]) is None
    assert allowed_of(state, [97, 98, 48]) == [END]
    assert allowed_of(grammar.begin(), []) == [97], "states do not share their places"


def test_drafts_stop_before_the_first_that_cannot_be_kept() -> None:
    """No token spells what must follow `a`."""
    vocabulary = {"x": 0, "b": 1, "1": 2, "<end>": 3, "a": 4}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bare.decoder = decoders.ByteLevel()
    small = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>")
    sampling = SamplingParams(regex="(a[03]|b1)+")
    grammar = grammar_of(sampling, small, 5, [3])
    assert grammar is not None
    state = grammar.begin()
    with pytest.raises(RolloutError, match=r"after 1 tokens .* allows none of the model's tokens"):
        state.allowed([4])
    assert allowed_of(state, [1]) == [2] and allowed_of(state, [1, 2]) == [1, 3, 4], "it goes on without that token"
    for drafts, kept in (([4, 2], []), ([1, 2, 4, 2], [1, 2]), ([1, 1, 2], [1]), ([1, 2, 1, 2], [1, 2, 1, 2])):
        sequence = TokenSequence(Request(Prompt((9,), ""), sampling, frozenset({3}), (), grammar), 0, [9])
        sequence.add_drafts(drafts)
        assert sequence.sampled_ids == kept and sequence.num_drafts == len(kept)
        assert sequence.grammar is not None and allowed_of(sequence.grammar, []) == [1, 4]


def test_every_completion_matches(make_engine: MakeEngine) -> None:
    sampling = SamplingParams(n=20, seed=1, temperature=1.5, max_new_tokens=30, regex="[a-c]{2,4}-(7|42)")
    completions = flat(make_engine().generate(make_prompts(4, 9), sampling))
    assert all(re.fullmatch("[a-c]{2,4}-(7|42)", c.text) and c.finish_reason == "stop" for c in completions)
    assert len({c.text for c in completions}) > 15


def test_every_completion_fits_the_schema(make_engine: MakeEngine) -> None:
    sampling = SamplingParams(n=10, seed=1, max_new_tokens=60, json_schema=SCHEMA)
    for completion in flat(make_engine().generate(make_prompts(5), sampling)):
        if completion.finish_reason == "stop":
            value = json.loads(completion.text)
            assert value["name"] in ("x", "yz") and value["n"] <= 9 and len(value) == 2


def test_logprobs_are_of_the_constrained_distribution(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    sampling = SamplingParams(n=6, seed=3, temperature=0.7, max_new_tokens=9, regex="[a-e]{3}")
    for rollout in make_engine().generate(make_prompts(6), sampling):
        for completion in rollout.completions:
            ids = (*rollout.prompt.token_ids, *completion.token_ids)
            rows = full_logprobs(llama, ids)[5:-1]
            for i, (row, token) in enumerate(zip(rows, completion.token_ids, strict=True)):
                allowed = range(97, 102) if i < 3 else [END]
                expected = slow.distribution(row.tolist(), sampling, allowed=allowed)[token]
                assert completion.logprobs[i] == pytest.approx(math.log(expected), abs=2e-5)
                assert completion.raw_logprobs is not None
                assert completion.raw_logprobs[i] == pytest.approx(float(row[token]), abs=2e-5)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"regex": "[0-9"}, r"sampling.regex is '\[0-9', .* unclosed character class"),
        ({"regex": "(?=a)b"}, "look-around, .* is not supported"),
        ({"regex": r"[^\s\S]"}, "it holds no text that has a token"),
        ({"json_schema": "{bad"}, "sampling.json_schema is '{bad', and no completion can follow it"),
        ({"json_schema": '{"type": "integer", "minimum": 5, "maximum": 3}'}, r"minimum \(5\) is greater than maximum"),
        ({"json_schema": '{"type": "intger"}'}, "Invalid type: intger"),
    ],
)
def test_impossible_grammars_are_refused_before_anything_is_generated(
    wrong: dict[str, str], message: str, make_engine: MakeEngine, llama: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    engine = make_engine()
    with pytest.raises(RolloutError, match=message):
        engine.generate(make_prompts(3), SamplingParams(**wrong))
    assert engine.num_computed == 0
    with pytest.raises(RolloutError, match=message):
        make_requests(make_prompts(3), [SamplingParams(**wrong)], llama, tokenizer)


def test_a_model_without_an_end_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(RolloutError, match=r"sampling\.regex needs an end token"):
        grammar_of(SamplingParams(regex="a"), tokenizer, VOCAB, [])


def test_a_missing_library_is_named(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignlab.rollout.grammars._is_installed", lambda: False)
    with pytest.raises(RolloutError, match=r"needs llguidance, and it is missing; install alignlab\[structured\]"):
        grammar_of(SamplingParams(regex="a"), tokenizer, VOCAB, [END])


def test_vllm_gets_the_grammar(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    [request] = make_requests(make_prompts(3), [SamplingParams(regex="a+")], llama, tokenizer)
    assert request.params["structured_outputs"] == {"regex": "a+"}
    [request] = make_requests(make_prompts(3), [SamplingParams(json_schema=SCHEMA)], llama, tokenizer)
    assert request.params["structured_outputs"] == {"json": SCHEMA}
