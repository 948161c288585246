"""A judge behind OpenAI's protocol: what is sent, how answers are read, what fails and what is sent again."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from alignlab.config.judge import EndpointJudge
from alignlab.errors import ConfigError
from alignlab.scoring.judges.chat_model import Failure
from alignlab.scoring.judges.endpoint import EndpointChatModel

QUESTION = [{"role": "user", "content": "1 or 2?"}]


def model(handle: Callable[[httpx2.Request], Any], **settings: Any) -> EndpointChatModel:
    judge_settings = EndpointJudge(url="http://judge/v1/", model="m", retry_wait_s=0, **settings)
    return EndpointChatModel(judge_settings, transport=httpx2.MockTransport(handle))


def answer(**choice: Any) -> httpx2.Response:
    return httpx2.Response(200, json={"choices": [choice]})


def likeliest(**tokens: float) -> httpx2.Response:
    listed = [{"token": token, "logprob": math.log(p)} for token, p in tokens.items()]
    return answer(message={"content": "1"}, logprobs={"content": [{"top_logprobs": listed}]})


def test_probabilities_of_the_first_token_are_read() -> None:
    seen: list[Any] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append((str(request.url), json.loads(request.content)))
        return likeliest(**{"1": 0.4, " 1": 0.1, "2": 0.3, "x": 0.1})

    [outcome] = model(handle).choose([QUESTION], ["1", "2"])
    assert outcome == pytest.approx((math.log(0.5), math.log(0.3)))
    [(url, sent)] = seen
    assert url == "http://judge/v1/chat/completions"
    assert sent == {
        "model": "m", "messages": QUESTION, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip


def test_a_choice_that_is_not_listed_has_at_most_the_least_listed_probability() -> None:
    [outcome] = model(lambda _: likeliest(**{"1": 0.6, "x": 0.2, "y": 0.01})).choose([QUESTION], ["1", "2"])
    assert outcome == pytest.approx((math.log(0.6), math.log(0.01)))


def test_listed_tokens_of_probability_0_are_ignored() -> None:
    """Servers write -9999 for a probability of 0, and may write numbers that are none."""
    listed = [{"token": "1", "logprob": 0.0}, {"token": "2", "logprob": -9999.0}, {"token": "1", "logprob": math.nan}]

    def handle(_: httpx2.Request) -> httpx2.Response:
        outcome = {"choices": [{"logprobs": {"content": [{"top_logprobs": listed}]}}]}
        return httpx2.Response(200, content=json.dumps(outcome))

    assert model(handle).choose([QUESTION], ["1", "2"]) == [(0.0, -9999.0)]


def test_the_identity_has_the_number_of_listed_tokens() -> None:
    assert model(lambda _: None).identity != model(lambda _: None, top_logprobs=2).identity


def test_an_answer_that_is_none_of_the_choices_is_nonsense() -> None:
    [outcome] = model(lambda _: likeliest(a=0.9, b=0.1)).choose([QUESTION], ["1", "2"])
    assert isinstance(outcome, Failure) and outcome.kind == "nonsense"


@pytest.mark.parametrize("logprobs", [None, {"content": []}, {"content": None}])
def test_a_server_without_log_probabilities_is_unusable(logprobs: Any) -> None:
    [outcome] = model(lambda _: answer(message={"content": "1"}, logprobs=logprobs)).choose([QUESTION], ["1", "2"])
    assert isinstance(outcome, Failure) and outcome.kind == "unusable" and "answers: sampled" in outcome.message


def test_texts_are_sampled_with_a_seed() -> None:
    seen: list[Any] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(json.loads(request.content))
        return answer(message={"content": "so 2"})

    assert model(handle).write([QUESTION], max_new_tokens=9, temperature=0.5, seed=3) == ["so 2"]
    assert (seen[0]["max_tokens"], seen[0]["temperature"], seen[0]["seed"]) == (9, 0.5, 3)


def test_transient_failures_are_retried_and_counted() -> None:
    answers = iter([httpx2.Response(503), httpx2.Response(429), likeliest(**{"1": 0.5, "2": 0.5})])
    chat_model = model(lambda _: next(answers))
    assert chat_model.choose([QUESTION], ["1", "2"]) == [pytest.approx((math.log(0.5), math.log(0.5)))]
    assert chat_model.num_retries == 2


def test_timeouts_lost_connections_and_rejections_are_distinct_failures() -> None:
    def late(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadTimeout("late", request=request)

    def gone(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("gone", request=request)

    kinds = {}
    for name, handle in {
        "late": late, "gone": gone, "angry": lambda _: httpx2.Response(401, text="no key"),
        "odd": lambda _: httpx2.Response(200, text="<html>"), "picky": lambda _: httpx2.Response(400, text="too long"),
    }.items():  # fmt: skip
        chat_model = model(handle, max_attempts=2)
        [outcome] = chat_model.choose([QUESTION], ["1", "2"])
        assert isinstance(outcome, Failure)
        kinds[name] = (outcome.kind, chat_model.num_retries)
    assert kinds == {
        "late": ("timeout", 1), "gone": ("unreachable", 1), "angry": ("unusable", 0), "odd": ("unusable", 0),
        "picky": ("refused", 0),
    }  # fmt: skip


def test_answers_come_in_the_order_of_the_questions() -> None:
    def handle(request: httpx2.Request) -> httpx2.Response:
        return answer(message={"content": json.loads(request.content)["messages"][0]["content"]})

    questions = [[{"role": "user", "content": str(i)}] for i in range(50)]
    outcome = model(handle, max_concurrent=8).write(questions, max_new_tokens=1, temperature=1, seed=0)
    assert outcome == [str(i) for i in range(50)]


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def handle(request: httpx2.Request) -> httpx2.Response:
        return answer(message={"content": request.headers["authorization"]})

    chat_model = model(handle, api_key_env="JUDGE_KEY")
    assert chat_model.write([QUESTION], max_new_tokens=1, temperature=1, seed=0) == ["Bearer secret"]
    assert "secret" not in chat_model.identity
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="environment variable JUDGE_KEY, and it is not set"):
        model(handle, api_key_env="JUDGE_KEY")


def test_an_invalid_address_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"url is 'localhost:8000', and must be the address of an OpenAI-compatible"):
        EndpointJudge(url="localhost:8000", model="m")
