"""Bias, bans, forced tokens, penalties and typical sampling: by hand, against the slow reference, and in the engine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.errors import RolloutError
from alignlab.rollout.decoding_rules import banned_phrases
from alignlab.rollout.embedded import sampling as fast
from alignlab.rollout.embedded.controls import Controls, most_typical, packed_bits
from alignlab.rollout.requests import check_prompts
from alignlab.rollout.vllm.completions import Answer, make_completion, make_requests
from alignlab.types import Completion, SamplingParams
from tests.reference import sampling as slow
from tests.rollout.conftest import END, VOCAB, MakeEngine, flat, full_logprobs, make_prompts

CPU = torch.device("cpu")
SHAPED: dict[str, dict[str, Any]] = {
    "typical": {"typical_p": 0.6},
    "bias": {"logit_bias": ((3, 4.0), (40, -2.0))},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 0.7},
    "bans": {"banned_token_ids": tuple(range(0, 250, 2))},
    "forced": {"forced_tokens": ((0, 7), (3, 250), (4, END))},
    "all": {
        "temperature": 0.8, "top_k": 60, "typical_p": 0.9, "repetition_penalty": 1.2, "presence_penalty": 0.5,
        "frequency_penalty": -0.3, "logit_bias": ((9, 3.0),), "banned_token_ids": (1, 2), "forced_tokens": ((2, 9),),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPED)
def test_the_engine_samples_from_the_distribution_of_the_reference(
    name: str, make_engine: MakeEngine, llama: PreTrainedModel
) -> None:
    sampling = SamplingParams(n=3, max_new_tokens=8, ignore_eos=True, seed=5, **SHAPED[name])
    forced = dict(sampling.forced_tokens)
    for rollout in make_engine().generate(make_prompts(4, 9), sampling):
        start = len(rollout.prompt.token_ids)
        for completion in rollout.completions:
            ids = (*rollout.prompt.token_ids, *completion.token_ids)
            rows = _logits(llama, ids)[start - 1 : -1]
            assert completion.raw_logprobs is not None
            for i, (row, token) in enumerate(zip(rows, completion.token_ids, strict=True)):
                expected = slow.distribution(
                    row.tolist(), sampling, seen=set(ids[: start + i]), written=completion.token_ids[:i],
                    banned=() if i in forced else sampling.banned_token_ids,
                    allowed={forced[i]} if i in forced else None,
                )
                assert completion.logprobs[i] == pytest.approx(math.log(expected[token]), abs=2e-5)
                assert completion.raw_logprobs[i] == pytest.approx(float(row.log_softmax(-1)[token]), abs=2e-5)
            assert all(completion.token_ids[i] == token for i, token in forced.items())


def _logits(model: PreTrainedModel, ids: tuple[int, ...]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_typical_by_hand() -> None:
    """Entropy of (1/2, 1/4, 1/8, 1/8): 1.75 bits; distances 0.75, 0.25, 1.25, 1.25."""
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).repeat(6, 1)
    typical_p = torch.tensor([0.1, 0.25, 0.26, 0.75, 0.76, 1.0])
    kept = [row.nonzero()[:, 0].tolist() for row in most_typical(probs * 3, typical_p)]
    assert kept == [[1], [1], [0, 1], [0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert float(most_typical(probs * 3, typical_p)[2, 0]) == 1.5, "what is kept is not normalised"


def test_typical_equals_a_sort_also_after_other_truncation() -> None:
    logits = torch.randn(30, 300, generator=torch.Generator().manual_seed(0)) * 3
    logits[:, 10:20] = logits[:, 5:6]
    for params in (SamplingParams(typical_p=0.3), SamplingParams(typical_p=0.8, top_k=30), SamplingParams(
        typical_p=0.95, min_p=0.01, temperature=2.0)):
        table = fast.SamplingTable.build([params] * 30, list(range(30)), vocab_size=300, device=CPU)
        weights, _ = fast.truncate((logits / params.temperature).softmax(-1), table)
        for row in range(30):
            expected = torch.tensor(slow.distribution(logits[row].tolist(), params))
            torch.testing.assert_close(weights[row] / weights[row].sum(), expected, rtol=1e-5, atol=1e-7)


def test_bias_comes_before_the_repetition_penalty_and_charges_after() -> None:
    logits = torch.tensor([[1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0]])
    controls = Controls.build([{0: 2.0, 1: 3.0}], [{0: -0.25, 8: 1.0}], [None])
    table = fast.SamplingTable.build([SamplingParams(repetition_penalty=2.0)], [0], vocab_size=9, device=CPU)
    adjusted = fast.adjust_logits(logits, table, torch.tensor([[0, 0], [0, 1]]), torch.tensor([[0, 8]]), controls)
    assert adjusted is not None
    assert adjusted[0].tolist() == [3 / 2 - 0.25, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -math.inf]
    only = Controls.build([{}, {}], [{}, {}], [None, packed_bits([8, 2], 9)])
    adjusted = fast.adjust_logits(logits.repeat(2, 1), table, None, None, only)
    assert adjusted is not None
    assert adjusted[0].tolist() == logits[0].tolist()
    assert adjusted[1].isfinite().nonzero()[:, 0].tolist() == [2, 8]
    assert Controls.build([{}], [{}], [None]) is None


def test_controls_of_one_request_do_not_change_another(make_engine: MakeEngine) -> None:
    prompts = make_prompts(5, 6, 7, 8)
    kinds = [replace(SamplingParams(n=2, seed=3, max_new_tokens=6, ignore_eos=True), **SHAPED[name])
             for name in ("bias", "frequency", "forced", "typical")]
    together = make_engine().generate(prompts, kinds)
    for prompt, sampling, rollout in zip(prompts, kinds, together, strict=True):
        alone = make_engine().generate([prompt], sampling)[0]
        assert [c.token_ids for c in alone.completions] == [c.token_ids for c in rollout.completions]


def test_banned_words_are_not_completed(make_engine: MakeEngine, tokenizer: PreTrainedTokenizerFast) -> None:
    assert banned_phrases(["ab"], tokenizer) == ((97, 98), (32, 97, 98))
    bias = tuple((token, 30.0) for token in (97, 98, 99))  # a, b and c, and nothing else
    sampling = SamplingParams(n=8, max_new_tokens=24, seed=1, logit_bias=bias, ignore_eos=True)
    free = flat(make_engine().generate(make_prompts(4), sampling))
    banned = flat(make_engine().generate(make_prompts(4), replace(sampling, banned_words=("ab", "cca"))))
    assert any("ab" in c.text for c in free) and any("cca" in c.text for c in free)
    assert not any("ab" in c.text or "cca" in c.text for c in banned)
    assert any("b" in c.text for c in banned) and any("ca" in c.text for c in banned)


def test_a_word_that_the_prompt_begins_may_be_completed(make_engine: MakeEngine) -> None:
    """The ban is of what is written: the first b here completes nothing that the completion began."""
    prompt = replace(make_prompts(3)[0], token_ids=(5, 97))
    sampling = SamplingParams(max_new_tokens=2, logit_bias=((98, 40.0),), banned_words=("ab",))
    assert flat(make_engine().generate([prompt], sampling))[0].text == "bb"


def test_greedy_follows_the_controls(make_engine: MakeEngine) -> None:
    greedy = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
    prompts = make_prompts(6)
    plain = flat(make_engine().generate(prompts, greedy))[0].token_ids
    banned = flat(make_engine().generate(prompts, replace(greedy, banned_token_ids=plain[:1])))[0]
    assert plain[0] not in banned.token_ids and banned.logprobs == (0.0,) * 6
    forced = flat(make_engine().generate(prompts, replace(greedy, forced_tokens=((2, 11),))))[0].token_ids
    assert forced[:2] == plain[:2] and forced[2] == 11


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"logit_bias": ((VOCAB, 1.0),)}, rf"sampling.logit_bias holds token {VOCAB}, and each token must be from 0 to"),
    ({"logit_bias": ((1, math.inf),)}, "logit_bias holds inf for token 1, and each must be finite; use banned_token"),
    ({"logit_bias": ((1, 1.0), (1, 2.0))}, "logit_bias holds a token twice"),
    ({"banned_token_ids": (-1,)}, "banned_token_ids holds token -1"),
    ({"banned_token_ids": tuple(range(VOCAB))}, f"holds all {VOCAB} tokens, and one must be left"),
    ({"banned_words": (" ",)}, "banned_words holds a blank text"),
    ({"forced_tokens": ((64, 1),)}, "forced_tokens holds the position 64, and each must be from 0 to 63"),
    ({"forced_tokens": ((1, 1), (1, 2))}, "forced_tokens holds a position twice"),
    ({"forced_tokens": ((1, 7),), "banned_token_ids": (7,)}, "token 7, and banned_token_ids bans it"),
    ({"regex": "a", "json_schema": "{}"}, "sampling.regex and sampling.json_schema are given, and one must be None"),
    ({"regex": "a", "min_new_tokens": 2}, r"sampling.min_new_tokens is 2, and must be 0 with sampling.regex"),
    ({"json_schema": "{}", "ignore_eos": True}, "sampling.ignore_eos is True, and must be False with sampling.json"),
    ({"regex": "a", "banned_words": ("x",)}, r"sampling.banned_words is \('x',\), and must be \(\) with"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_contradictions_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RolloutError, match=message):
        check_prompts(make_prompts(3), [SamplingParams(**wrong)], VOCAB, [])


@pytest.mark.parametrize("temperatures", [(1.0,), (0.0,), (0.0, 1.0)], ids=str)
def test_words_that_leave_nothing_are_named(temperatures: tuple[float, ...], make_engine: MakeEngine) -> None:
    words = tuple(chr(token) for token in range(33, 127))
    nothing = SamplingParams(banned_words=words, top_k=1, banned_token_ids=(*range(33), *range(127, VOCAB)))
    sampling = [replace(nothing if number == 0 else SamplingParams(), temperature=temperature)
                for number, temperature in enumerate(temperatures)]  # fmt: skip
    with pytest.raises(RolloutError, match=r"after 0 tokens of a completion, banned_words, .* leave no token"):
        make_engine().generate(make_prompts(*[3] * len(sampling)), sampling)


def test_vllm_gets_what_it_knows(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    known = SamplingParams(
        presence_penalty=0.5, frequency_penalty=-1.0, logit_bias=((4, 2.0),), banned_words=("ab",), seed=1
    )
    [request] = make_requests(make_prompts(3), [known], llama, tokenizer)
    expected = {"presence_penalty": 0.5, "frequency_penalty": -1.0, "logit_bias": {4: 2.0}, "bad_words": ["ab"]}
    assert {name: request.params[name] for name in expected} == expected
    [plain] = make_requests(make_prompts(3), [SamplingParams(seed=1)], llama, tokenizer)
    assert not {*expected, "structured_outputs"} & set(plain.params)
    refused: dict[str, Any] = {
        "typical_p": 0.5, "banned_token_ids": (3,), "forced_tokens": ((0, 1),), "logit_bias": ((3, -101.0),),
        "presence_penalty": 2.5, "frequency_penalty": -3.0,
    }
    for name, value in refused.items():
        with pytest.raises(RolloutError, match=rf"sampling\.{name} .* rollout.engine: embedded"):
            make_requests(make_prompts(3), [SamplingParams(**{name: value})], llama, tokenizer)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty", "logit_bias", "banned_words", "regex"])
def test_logprobs_under_a_control_are_not_taken_for_the_models_own(
    name: str, llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    values: dict[str, Any] = {"logit_bias": ((1, 1.0),), "banned_words": ("x",), "regex": "a"}
    answer = Answer((97, END), (-1.0, -2.0), "stop", None, (0, 0), None)

    def completion(sampling: SamplingParams) -> Completion:
        return make_completion(answer, tokenizer, sampling, llama)

    assert completion(SamplingParams()).raw_logprobs == (-1.0, -2.0)
    assert completion(SamplingParams(**{name: values.get(name, 0.5)})).raw_logprobs is None


def test_a_request_that_vllm_gave_up_is_named(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    answer = Answer((97,), (-1.0,), "error", None, (0,), None)
    with pytest.raises(RolloutError, match="vLLM ended a completion with 'error' after 1 tokens"):
        make_completion(answer, tokenizer, SamplingParams(regex="a"), llama)


def test_full_logprobs_is_unchanged_by_controls(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    """What is trained on is the model's own log-prob, which the engine scores without any control."""
    sampling = SamplingParams(max_new_tokens=5, ignore_eos=True, logit_bias=((3, 9.0),), seed=2)
    engine = make_engine()
    [rollout] = engine.generate(make_prompts(4), sampling)
    scored = engine.logprobs([rollout])[0]
    ids = (*rollout.prompt.token_ids, *rollout.completions[0].token_ids)
    expected = full_logprobs(llama, ids)[3:-1].gather(1, torch.tensor(ids[4:])[:, None])[:, 0]
    torch.testing.assert_close(scored, expected, atol=1e-5, rtol=0)
