"""The behaviour that all rollout engines share, tested on each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.config.rollout import RolloutSettings
from alignlab.errors import RolloutError
from alignlab.rollout.detokenizer import decode
from alignlab.rollout.engine import RolloutEngine, make_engine
from alignlab.types import SamplingParams
from tests.reference import sampling as slow
from tests.rollout.conftest import END, flat, full_logprobs, make_prompts
from tests.rollout.vllm.conftest import DENSE, INSTALLED, make_client, make_model, make_vllm, serve

__all__ = ["make_client", "make_vllm", "serve"]  # fixtures, used by name
NEEDS_VLLM = pytest.mark.skipif(not INSTALLED, reason="needs vLLM")
SHAPED = {
    "plain": {}, "cold": {"temperature": 0.6}, "hot": {"temperature": 1.7}, "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7}, "min_p": {"min_p": 0.2}, "penalty": {"repetition_penalty": 1.6},
    "bias": {"logit_bias": ((65, 5.0), (66, -3.0))},
    "charges": {"presence_penalty": 1.5, "frequency_penalty": 0.5},
    "all": {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model(DENSE)


WITH_VLLM = [pytest.param(name, marks=[pytest.mark.vllm, NEEDS_VLLM]) for name in ("vllm", "vllm_server")]


@pytest.fixture(scope="module", params=["embedded", *WITH_VLLM])
def engine(
    request: pytest.FixtureRequest, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> Iterator[Any]:
    if request.param == "vllm":
        yield request.getfixturevalue("make_vllm")(model)
    elif request.param == "vllm_server":
        settings, _ = request.getfixturevalue("serve")(model)
        yield request.getfixturevalue("make_client")(model, settings)
    else:
        yield make_engine(model, tokenizer, RolloutSettings())


def test_it_is_the_protocol(engine: Any) -> None:
    assert isinstance(engine, RolloutEngine)


def test_greedy_is_the_argmax_of_the_full_forward(engine: Any, model: PreTrainedModel) -> None:
    prompts = make_prompts(1, 6, 40)
    rollouts = engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=16, ignore_eos=True))
    for prompt, completion in zip(prompts, flat(rollouts), strict=True):
        expected = list(prompt.token_ids)
        for _ in range(16):
            expected.append(int(full_logprobs(model, expected)[-1].argmax()))
        assert completion.token_ids == tuple(expected[len(prompt.token_ids) :])
        assert completion.logprobs == (0.0,) * 16


@pytest.mark.parametrize("kind", SHAPED)
def test_logprobs_are_of_the_distribution_sampled_from(kind: str, engine: Any, model: PreTrainedModel) -> None:
    sampling = SamplingParams(n=3, max_new_tokens=10, ignore_eos=True, seed=5, **SHAPED[kind])
    for rollout in engine.generate(make_prompts(4, 9), sampling):
        start = len(rollout.prompt.token_ids)
        for completion in rollout.completions:
            token_ids = (*rollout.prompt.token_ids, *completion.token_ids)
            rows = full_logprobs(model, token_ids)[start - 1 : -1]
            for i, (row, token, logprob) in enumerate(
                zip(rows, completion.token_ids, completion.logprobs, strict=True)
            ):
                seen = set(token_ids[: start + i]) if sampling.repetition_penalty != 1 else ()
                expected = slow.distribution(
                    row.tolist(), sampling, seen=seen, written=completion.token_ids[:i]
                )[token]
                # The penalty is of logits, and log-probs differ from them by a constant that it does not commute with.
                if sampling.repetition_penalty == 1:
                    assert logprob == pytest.approx(float(torch.tensor(expected).log()), abs=2e-5)
                if completion.raw_logprobs is not None:
                    assert completion.raw_logprobs[i] == pytest.approx(float(row[token]), abs=2e-5)


@pytest.mark.filterwarnings("ignore:max_rollback_tokens:DeprecationWarning")  # vLLM's call of xgrammar
def test_a_grammar_is_kept_and_logprobs_are_of_what_it_allows(engine: Any, model: PreTrainedModel) -> None:
    sampling = SamplingParams(n=6, seed=3, max_new_tokens=9, regex="[a-e]{3}")
    for rollout in engine.generate(make_prompts(6), sampling):
        for completion in rollout.completions:
            assert re.fullmatch("[a-e]{3}", completion.text) and completion.token_ids[3:] == (END,)
            rows = full_logprobs(model, (*rollout.prompt.token_ids, *completion.token_ids))[5:8]
            expected = rows[:, 97:102].log_softmax(-1).gather(1, torch.tensor(completion.token_ids[:3])[:, None] - 97)
            assert completion.logprobs[:3] == pytest.approx(expected[:, 0].tolist(), abs=2e-5)


def test_banned_words_are_not_written(engine: Any) -> None:
    bias = tuple((token, 30.0) for token in (97, 98, 99))
    sampling = SamplingParams(n=8, max_new_tokens=12, seed=1, logit_bias=bias, ignore_eos=True)
    assert any("ab" in c.text for c in flat(engine.generate(make_prompts(4), sampling)))
    banned = flat(engine.generate(make_prompts(4), replace(sampling, banned_words=("ab",))))
    assert not any("ab" in c.text for c in banned) and any("b" in c.text for c in banned)


def test_plain_sampling_knows_the_models_own_logprobs(engine: Any) -> None:
    completion = flat(engine.generate(make_prompts(5), SamplingParams(max_new_tokens=4, ignore_eos=True)))[0]
    assert completion.raw_logprobs is not None
    assert completion.raw_logprobs == pytest.approx(completion.logprobs, abs=1e-6)


def test_order_and_lengths(engine: Any) -> None:
    prompts = make_prompts(3, 40, 8)
    rollouts = engine.generate(prompts, SamplingParams(n=2, max_new_tokens=9, ignore_eos=True))
    assert [r.prompt for r in rollouts] == prompts
    for completion in flat(rollouts):
        assert len(completion.token_ids) == len(completion.logprobs) == len(completion.policy_versions) == 9
        assert completion.finish_reason == "length"
    assert engine.generate([], SamplingParams()) == []


def test_rest_and_abandon_between_calls_change_nothing(engine: Any) -> None:
    prompts, sampling = make_prompts(6, 20), SamplingParams(n=2, seed=4, max_new_tokens=8, ignore_eos=True)
    before = [c.token_ids for c in flat(engine.generate(prompts, sampling))]
    engine.rest()
    engine.abandon()
    engine.rest()
    assert [c.token_ids for c in flat(engine.generate(prompts, sampling))] == before


def test_seeds(engine: Any) -> None:
    prompts = make_prompts(6, 6)

    def draw(seed: int | None, chosen: list[Any] = prompts, n: int = 3) -> list[tuple[int, ...]]:
        sampling = SamplingParams(n=n, seed=seed, max_new_tokens=8, ignore_eos=True)
        return [c.token_ids for c in flat(engine.generate(chosen, sampling))]

    assert draw(7) == draw(7)
    assert len(set(draw(7) + draw(8))) == 12
    assert draw(7, prompts[1:], n=2) == draw(7)[3:5]  # whatever else is in the batch
    assert draw(7, [prompts[0], prompts[0]]) == draw(7, [prompts[0]], n=6)
    torch.manual_seed(3)
    first = draw(None)
    assert first != draw(None)
    torch.manual_seed(3)
    assert draw(None) == first


def test_generating_leaves_the_trainers_random_numbers_alone(engine: Any) -> None:
    before = torch.get_rng_state()
    engine.generate(make_prompts(5), SamplingParams(max_new_tokens=4, seed=1))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("minimum", [0, 5])
def test_end_tokens_stop_but_not_too_early(minimum: int, engine: Any) -> None:
    sampling = SamplingParams(n=30, temperature=2.0, seed=1, max_new_tokens=30, stop_token_ids=tuple(range(60)))
    completions = flat(engine.generate(make_prompts(4), replace(sampling, min_new_tokens=minimum)))
    lengths = [len(c.token_ids) for c in completions]
    assert min(lengths) == minimum + 1 if minimum else min(lengths) < 5
    for completion in completions:
        ended = [token < 60 or token == END for token in completion.token_ids]
        assert not any(ended[:-1])
        assert completion.finish_reason == ("stop" if ended[-1] else "length")


def test_ignoring_the_end(engine: Any) -> None:
    sampling = SamplingParams(n=60, temperature=2.0, seed=2, max_new_tokens=30, ignore_eos=True)
    completions = flat(engine.generate(make_prompts(4), sampling))
    assert all(len(c.token_ids) == 30 for c in completions)
    assert any(END in c.token_ids for c in completions)


def test_text_is_cut_before_a_stop_string_and_tokens_are_kept(
    engine: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    sampling = SamplingParams(n=30, seed=4, max_new_tokens=40, stop=("e", "5"))
    completions = flat(engine.generate(make_prompts(4, 9), sampling))
    stopped = [c for c in completions if c.finish_reason == "stop" and END not in c.token_ids]
    assert stopped
    for completion in completions:
        whole = decode(tokenizer, completion.token_ids)
        assert not {"e", "5"} & set(completion.text)
        if completion in stopped:
            assert completion.text == whole[:-1] and whole[-1] in "e5"
        else:
            assert completion.text == whole


@pytest.mark.parametrize(
    ("lengths", "sampling", "message"),
    [
        ((5, 100), {}, r"prompt 1 has 100 tokens, and with max_new_tokens \(64\) must not exceed the model's"),
        ((4, 0), {}, "prompt 1 has 0 tokens, and must have at least one"),
        ((4,), {"top_p": 0.0}, "sampling.top_p is 0.0, and must be over 0"),
        ((4,), {"n": 0}, "sampling.n is 0, and must be at least 1"),
    ],
)
def test_prompts_and_parameters_out_of_range_are_refused(
    lengths: tuple[int, ...], sampling: dict[str, Any], message: str, engine: Any
) -> None:
    with pytest.raises(RolloutError, match=message):
        engine.generate(make_prompts(*lengths), SamplingParams(**sampling))


def test_new_weights_are_used_and_their_version_is_on_every_token(engine: Any, model: PreTrainedModel) -> None:
    prompts, sampling = make_prompts(40), SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    version = engine.policy_version
    before = flat(engine.generate(prompts, sampling))[0]
    assert before.policy_versions == (version,) * 12
    saved = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.15)
    try:
        with pytest.raises(RolloutError, match=f"changed since version {version}, .* call update_weights with a new"):
            engine.generate(prompts, sampling)
        engine.update_weights(version + 3)
        after = flat(engine.generate(prompts, sampling))[0]  # the prompt's cached keys are of the old weights
        assert after.policy_versions == (version + 3,) * 12
        expected = list(prompts[0].token_ids)
        for _ in range(12):
            expected.append(int(full_logprobs(model, expected)[-1].argmax()))
        assert after.token_ids == tuple(expected[40:])
        with pytest.raises(RolloutError, match=f"policy_version is {version + 3}, and must be over the present one"):
            engine.update_weights(version + 3)
    finally:
        model.load_state_dict(saved)
        engine.update_weights(version + 4)
    assert flat(engine.generate(prompts, sampling))[0].token_ids == before.token_ids
