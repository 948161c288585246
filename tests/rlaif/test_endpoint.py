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
from alignlab.rlaif.chat_model import Failure
from alignlab.rlaif.endpoint import EndpointChatModel

QUESTION = [{"role": "user", "content": "1 or 2?"}]


def model(handle: Callable[[httpx2.Request], Any], **settings: Any) -> EndpointChatModel:
    asked = EndpointJudge(url="http://judge/v1/", model="m", retry_wait_s=0, **settings)
    return EndpointChatModel(asked, transport=httpx2.MockTransport(handle))


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

    [told] = model(handle).choose([QUESTION], ["1", "2"])
    assert told == pytest.approx((math.log(0.5), math.log(0.3)))
    [(url, sent)] = seen
    assert url == "http://judge/v1/chat/completions"
    assert sent == {
        "model": "m", "messages": QUESTION, "max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 20,
    }  # fmt: skip


def test_a_choice_that_is_not_listed_has_at_most_the_least_listed_probability() -> None:
    [told] = model(lambda _: likeliest(**{"1": 0.6, "x": 0.2, "y": 0.01})).choose([QUESTION], ["1", "2"])
    assert told == pytest.approx((math.log(0.6), math.log(0.01)))


def test_impossible_tokens_are_no_fault() -> None:
    """Servers write -9999 for a probability of 0, and may write numbers that are none."""
    listed = [{"token": "1", "logprob": 0.0}, {"token": "2", "logprob": -9999.0}, {"token": "1", "logprob": math.nan}]

    def handle(_: httpx2.Request) -> httpx2.Response:
        told = {"choices": [{"logprobs": {"content": [{"top_logprobs": listed}]}}]}
        return httpx2.Response(200, content=json.dumps(told))

    assert model(handle).choose([QUESTION], ["1", "2"]) == [(0.0, -9999.0)]


def test_the_number_of_tokens_that_are_told_is_part_of_who_it_is() -> None:
    assert model(lambda _: None).identity != model(lambda _: None, top_logprobs=2).identity


def test_none_of_the_choices_is_nonsense() -> None:
    [told] = model(lambda _: likeliest(a=0.9, b=0.1)).choose([QUESTION], ["1", "2"])
    assert isinstance(told, Failure) and told.kind == "nonsense"


@pytest.mark.parametrize("logprobs", [None, {"content": []}, {"content": None}])
def test_a_server_without_probabilities_is_told_apart(logprobs: Any) -> None:
    [told] = model(lambda _: answer(message={"content": "1"}, logprobs=logprobs)).choose([QUESTION], ["1", "2"])
    assert isinstance(told, Failure) and told.kind == "unusable" and "answers: sampled" in told.message


def test_texts_are_sampled_with_a_seed() -> None:
    seen: list[Any] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen.append(json.loads(request.content))
        return answer(message={"content": "so 2"})

    assert model(handle).write([QUESTION], max_new_tokens=9, temperature=0.5, seed=3) == ["so 2"]
    assert (seen[0]["max_tokens"], seen[0]["temperature"], seen[0]["seed"]) == (9, 0.5, 3)


def test_what_may_pass_is_sent_again_and_counted() -> None:
    answers = iter([httpx2.Response(503), httpx2.Response(429), likeliest(**{"1": 0.5, "2": 0.5})])
    asked = model(lambda _: next(answers))
    assert asked.choose([QUESTION], ["1", "2"]) == [pytest.approx((math.log(0.5), math.log(0.5)))]
    assert asked.num_retries == 2


def test_a_slow_a_lost_and_an_angry_server_are_told_apart() -> None:
    def late(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ReadTimeout("late", request=request)

    def gone(request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("gone", request=request)

    kinds = {}
    for name, handle in {
        "late": late, "gone": gone, "angry": lambda _: httpx2.Response(401, text="no key"),
        "odd": lambda _: httpx2.Response(200, text="<html>"), "picky": lambda _: httpx2.Response(400, text="too long"),
    }.items():  # fmt: skip
        asked = model(handle, max_attempts=2)
        [told] = asked.choose([QUESTION], ["1", "2"])
        assert isinstance(told, Failure)
        kinds[name] = (told.kind, asked.num_retries)
    assert kinds == {
        "late": ("timeout", 1), "gone": ("unreachable", 1), "angry": ("unusable", 0), "odd": ("unusable", 0),
        "picky": ("refused", 0),
    }  # fmt: skip


def test_answers_come_in_the_order_of_the_questions() -> None:
    def handle(request: httpx2.Request) -> httpx2.Response:
        return answer(message={"content": json.loads(request.content)["messages"][0]["content"]})

    questions = [[{"role": "user", "content": str(i)}] for i in range(50)]
    told = model(handle, max_concurrent=8).write(questions, max_new_tokens=1, temperature=1, seed=0)
    assert told == [str(i) for i in range(50)]


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret")

    def handle(request: httpx2.Request) -> httpx2.Response:
        return answer(message={"content": request.headers["authorization"]})

    asked = model(handle, api_key_env="JUDGE_KEY")
    assert asked.write([QUESTION], max_new_tokens=1, temperature=1, seed=0) == ["Bearer secret"]
    assert "secret" not in asked.identity
    monkeypatch.delenv("JUDGE_KEY")
    with pytest.raises(ConfigError, match="environment variable JUDGE_KEY, and it is not set"):
        model(handle, api_key_env="JUDGE_KEY")


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"url is 'localhost:8000', and must be the address of an OpenAI-compatible"):
        EndpointJudge(url="localhost:8000", model="m")
