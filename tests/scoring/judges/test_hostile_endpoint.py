"""Judges behind servers that are slow, endless, compressed, wrong, or curious about keys."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import time
from typing import Any

import pytest

from alignlab.config.judge import EndpointJudge
from alignlab.errors import ConfigError
from alignlab.scoring.judges import endpoint
from alignlab.scoring.judges.chat_model import Failure
from alignlab.scoring.judges.endpoint import EndpointChatModel
from tests.network.hostile_server import Answer, always, endless, hostile_server, response

QUESTION = [{"role": "user", "content": "1 or 2?"}]
KEY = "sk-0123456789abcdef"
PIECES = {
    "a byte of the body at a time": endless(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" ", every_s=0.02),
    "headers without an end": endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", every_s=0.02),
    "a status line without an end": endless(b"HTTP", b"/", every_s=0.02),
    "informational answers without an end": endless(b"", b"HTTP/1.1 102 Processing\r\n\r\n", every_s=0.02),
}


def ask(answer: Answer, **settings: Any) -> tuple[str | Failure, EndpointChatModel]:
    """What becomes of one question, and the model that asked it."""
    with hostile_server(answer) as server:
        judge = EndpointJudge(url=f"{server.url}/v1", model="m", **{"max_attempts": 1, "retry_wait_s": 0} | settings)
        model = EndpointChatModel(judge)
        [outcome] = model.write([QUESTION], max_new_tokens=1, temperature=1, seed=0)
        return outcome, model


def failure(answer: Answer, **settings: Any) -> Failure:
    outcome, _ = ask(answer, **settings)
    assert isinstance(outcome, Failure)
    return outcome


def completion(**choice: Any) -> bytes:
    return response({"choices": [{"message": {"content": "1"}} | choice]})


@pytest.mark.parametrize("name", PIECES)
def test_a_server_that_never_stops_answering_is_given_up_at_the_deadline(name: str) -> None:
    outcome = failure(PIECES[name], request_timeout_s=0.3)
    assert outcome.kind == "timeout"
    assert "waited for http://127.0.0.1:" in outcome.message and "did not answer whole within 0.3 s" in outcome.message


def test_a_body_without_an_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "MAX_ANSWER_BYTES", 100_000)
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    for head in (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"):
        outcome = failure(endless(head, chunk), request_timeout_s=60)
        assert outcome.kind == "unusable" and "answers with more than 100,000 bytes" in outcome.message


def test_the_size_of_a_compressed_answer_is_limited_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is unpacked up to the limit, and no further: all of it would be 64 times as much."""
    monkeypatch.setattr(endpoint, "MAX_ANSWER_BYTES", 2**20)
    bomb = gzip.compress(b" " * 2**26)
    outcome = failure(always(response(bomb, Content_Encoding="gzip")), request_timeout_s=60)
    assert outcome.kind == "unusable" and "answers with more than 1,048,576 bytes" in outcome.message


def test_only_the_beginning_of_a_long_error_is_read() -> None:
    head = b"HTTP/1.1 400 Bad\r\nContent-Type: text/plain\r\n\r\n"
    outcome = failure(endless(head, b"\x1b[31m too long\n" * 4096), request_timeout_s=60)
    assert outcome.kind == "refused" and len(outcome.message) < 400 and outcome.message.isprintable()


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"<html>busy</html>", "unusable"),
        (b"[" * 200_000, "unusable"),
        (b"\xff\xfe\x00", "unusable"),
        (b"9" * 5000, "unusable"),
        (b'"choices"', "unusable"),
        (b'{"choices": []}', "unusable"),
        (b'{"choices": {"0": {"message": {"content": "1"}}}}', "unusable"),
        (b'{"choices": [{"message": {"content": "1"}}, {"message": {"content": "2"}}]}', "unusable"),
        (b'{"choices": ["1"]}', "unusable"),
        (b'{"choices": [{"message": "1"}]}', "refused"),
        (b'{"choices": [{"message": {"content": ["1"]}}]}', "refused"),
        (b'{"choices": [{"message": {"content": "\\ud800"}}]}', "nonsense"),
    ],
)  # fmt: skip
def test_a_reply_that_is_no_completion_is_a_failure(body: bytes, kind: str) -> None:
    assert failure(always(response(body))).kind == kind


@pytest.mark.parametrize("status", ["204 No Content", "302 Found", "206 Partial Content"])
def test_a_redirect_or_another_status_is_a_failure_and_is_not_followed(status: str) -> None:
    body = completion().partition(b"\r\n\r\n")[2]
    outcome = failure(always(response(body, status=status, Location="http://127.0.0.1:1/v1/chat/completions")))
    assert outcome.kind == "unusable" and f"status {status[:3]}" in outcome.message


@pytest.mark.parametrize("logprob", [0.5, 10**400, -(10**400), "-0.1", None, True, [0.0]])
def test_a_value_that_cannot_be_a_log_probability_is_refused(logprob: Any) -> None:
    logprobs = {"content": [{"top_logprobs": [{"token": "1", "logprob": logprob}]}]}
    with hostile_server(always(completion(logprobs=logprobs))) as server:
        model = EndpointChatModel(EndpointJudge(url=f"{server.url}/v1", model="m", max_attempts=1))
        [outcome] = model.choose([QUESTION], ["1", "2"])
    assert isinstance(outcome, Failure) and outcome.kind == "unusable"


def test_a_server_s_retry_after_is_respected_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(endpoint.anyio, "sleep", sleep)
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 5000))
    headers = iter(["7", "1e9", "nan", "-3", later, "soon", ""])
    outcome, model = ask(
        lambda server, request: [response(b"", status="429 Too Many", Retry_After=next(headers, ""))],
        max_attempts=2000, retry_wait_s=0.5,
    )  # fmt: skip
    assert isinstance(outcome, Failure) and outcome.kind == "unreachable" and model.num_retries == 1999
    assert waits[:9] == [7, 120, 2, 4, 120, 16, 32, 64, 120] and set(waits[9:]) == {120}


def test_after_many_failures_in_a_row_no_further_question_is_sent(caplog: pytest.LogCaptureFixture) -> None:
    """And it is said at the first failure, not at the end."""
    with hostile_server(always(response(b"", status="503 Busy"))) as server:
        judge = EndpointJudge(url=f"{server.url}/v1", model="m", max_concurrent=2, max_attempts=2, retry_wait_s=0)
        outcomes = EndpointChatModel(judge).write([QUESTION] * 50, max_new_tokens=1, temperature=1, seed=0)
    assert [isinstance(outcome, Failure) and outcome.kind for outcome in outcomes] == ["unreachable"] * 50
    assert 8 <= len(server.requests) <= 12  # four questions in a row, or those that were on their way
    [record] = caplog.records
    assert "answers with status 503" in record.getMessage() and "asked up to 2 times" in record.getMessage()


def test_a_server_that_answers_some_questions_is_sent_all() -> None:
    answers = itertools.cycle([response(b"", status="503 Busy"), completion()])
    with hostile_server(lambda server, request: [next(answers)]) as server:
        # One at a time, so that answers come in order: two failures in a row would be an outage.
        judge = EndpointJudge(url=f"{server.url}/v1", model="m", max_concurrent=1, max_attempts=1)
        outcomes = EndpointChatModel(judge).write([QUESTION] * 20, max_new_tokens=1, temperature=1, seed=0)
        assert len(server.requests) == 20
    assert outcomes.count("1") == 10


def test_a_lone_surrogate_in_a_question_is_sent_escaped() -> None:
    with hostile_server(always(completion())) as server:
        model = EndpointChatModel(EndpointJudge(url=f"{server.url}/v1", model="m"))
        question = [{"role": "user", "content": "\ud800"}]
        assert model.write([question], max_new_tokens=1, temperature=1, seed=0) == ["1"]
        [request] = server.requests
    assert json.loads(request.partition(b"\r\n\r\n")[2])["messages"] == question


def test_requests_to_this_machine_bypass_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    with hostile_server(always(completion())) as proxy, hostile_server(always(completion())) as server:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        port = server.url.rpartition(":")[2]
        for host in ("127.0.0.1", "localhost", "127.1", "0.0.0.0"):
            judge = EndpointJudge(url=f"http://{host}:{port}/v1", model="m", max_attempts=1, api_key_env="JUDGE_KEY")
            assert EndpointChatModel(judge).write([QUESTION], max_new_tokens=1, temperature=1, seed=0) == ["1"]
        assert proxy.requests == [] and len(server.requests) == 4
        away = EndpointJudge(url="http://judge.invalid/v1", model="m", max_attempts=1)
        assert EndpointChatModel(away).write([QUESTION], max_new_tokens=1, temperature=1, seed=0) == ["1"]
        assert len(proxy.requests) == 1  # a proxy is used where one is needed


def test_a_key_is_in_no_message_and_no_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    echo = response(f"x {KEY} is no key of ours".encode(), status="401 Unauthorized")
    outcome, model = ask(always(echo), api_key_env="JUDGE_KEY")
    assert isinstance(outcome, Failure) and "is no key of ours" in outcome.message and KEY not in outcome.message
    assert KEY not in repr(model) and KEY not in model.identity
    outcome, _ = ask(always(response(b"<" + b"-" * 194 + KEY.encode())), api_key_env="JUDGE_KEY")
    assert isinstance(outcome, Failure) and KEY[:3] not in outcome.message


@pytest.mark.parametrize("value", ["", "  \n", "two words", "line\nbreak", "\u00e9" * 20])
def test_an_invalid_key_is_refused_without_being_shown(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", value)
    with pytest.raises(ConfigError, match="environment variable JUDGE_KEY") as raised:
        EndpointChatModel(EndpointJudge(model="m", api_key_env="JUDGE_KEY"))
    assert not value.strip() or value not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@127.0.0.1:8000/v1", f"https://{KEY}@host/v1", f"http://host/v1?api_key={KEY}",
        f"http://host/v1#{KEY}", f"http://user:{KEY}@[::1/v1", f"ftp://user:{KEY}@host/", f"http://a:{KEY}@host:port/v1",
    ],
)  # fmt: skip
def test_a_key_in_an_address_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^url is ") as raised:
        EndpointJudge(url=url, model="m")
    assert KEY not in str(raised.value)


@pytest.mark.parametrize("url", ["", "http://", "http://[", "http://a b/v1", "http://a\n/v1", "http://" + "a" * 2048])
def test_an_invalid_address_is_refused_in_a_short_message(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^url is .* must be the address of an OpenAI-compatible server") as raised:
        EndpointJudge(url=url, model="m")
    assert len(str(raised.value)) < 300


def test_a_key_in_place_of_its_variable_s_name_is_refused_and_not_shown() -> None:
    with pytest.raises(ConfigError, match="must name an environment variable in capitals") as raised:
        EndpointJudge(model="m", api_key_env=KEY)
    assert KEY not in str(raised.value)


def test_a_key_sent_unencrypted_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    for url in ("http://127.0.0.1:1/v1", "https://judge.invalid/v1", "http://judge.invalid/v1"):
        EndpointChatModel(EndpointJudge(url=url, model="m", api_key_env="JUDGE_KEY"))
    [record] = caplog.records
    assert record.getMessage().startswith("the judge's key travels unencrypted to http://judge.invalid/v1")


def test_probabilities_of_a_well_formed_reply_are_read() -> None:
    listed = [{"token": "1", "logprob": math.log(0.5)}, {"token": "2", "logprob": 1e-7}]
    answer = completion(logprobs={"content": [{"top_logprobs": listed}]})
    with hostile_server(always(answer)) as server:
        model = EndpointChatModel(EndpointJudge(url=f"{server.url}/v1", model="m"))
        assert model.choose([QUESTION], ["1", "2"]) == [pytest.approx((math.log(0.5), 0.0), abs=1e-6)]
