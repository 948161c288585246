"""Servers whose answers cannot be true or never end, or that repeat the token."""

from __future__ import annotations

import base64
import io
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import numpy as np
import pytest
import torch

from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import ConfigError, RolloutError
from alignlab.rollout.vllm import client, launch, pool, protocol
from alignlab.rollout.vllm.answers import FaultyAnswer, only_choice, recorded_experts
from alignlab.rollout.vllm.client import ServerFaulty, ServerLost, VLLMServer, http_client
from alignlab.rollout.vllm.completions import Request
from alignlab.rollout.vllm.launch import ServerProcess, make_server
from alignlab.rollout.vllm.serialization import decode_routing, decode_vllms_routing, encode_routing
from tests.network.hostile_server import Answer, always, endless, hostile_server, response
from tests.rollout.vllm.conftest import free_address
from tests.rollout.vllm.stand_in import requests, weights

TOKEN = "a-token-of-the-tests"
ANY = Request((1, 2), {"max_tokens": 1, "stop": ["."]})


def of_choice(**fields: Any) -> Callable[[dict[str, Any], str], Any]:
    """Change fields of the only completion."""
    return lambda answer, name: answer | {"choices": [answer["choices"][0] | fields]}


def logprob(value: Any) -> Callable[[dict[str, Any], str], Any]:
    return of_choice(logprobs={"content": [{"logprob": value}]})


FAULTS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "NaN": logprob(float("nan")),
    "minus infinity": logprob(float("-inf")),
    "a probability over 1": logprob(0.5),
    "text for a log-probability": logprob("-1.0"),
    "true for a log-probability": logprob(True),
    "a log-probability of 400 digits": logprob(-(10**400)),
    "no log-probability": of_choice(logprobs=None),
    "log-probabilities of no token": of_choice(logprobs={"content": []}),
    "a token beyond the vocabulary": of_choice(token_ids=[10]),
    "a negative token": of_choice(token_ids=[-1]),
    "a token that is a fraction": of_choice(token_ids=[7.0]),
    "no tokens": of_choice(token_ids=[]),
    "tokens of another type": of_choice(token_ids="7"),
    "no completion": lambda answer, name: answer | {"choices": []},
    "two completions": lambda answer, name: answer | {"choices": answer["choices"] * 2},
    "completions of another type": lambda answer, name: answer | {"choices": {"0": 1}},
    "the answer to another request": lambda answer, name: answer | {"request_id": "generate-tokens-run-0-999999"},
    "no versions": of_choice(weight_versions=[]),
    "versions of another type": of_choice(weight_versions=[7]),
    "a version that is none": of_choice(weight_versions=[{"version": "x", "start": 0, "end": 1}]),
    "a version of a million tokens": of_choice(weight_versions=[{"version": "run-1-1", "start": 0, "end": 10**6}]),
    "another reason to stop": of_choice(stop_reason=[1]),
    "a page": lambda answer, name: b"<html>It works!</html>",
    "JSON without an end": lambda answer, name: b"[" * 100_000,
    "a list": lambda answer, name: [answer],
    "half a character": lambda answer, name: b"\xff",
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_answer_is_counted_and_the_request_goes_to_another_server(name: str, start: Any, connect: Any) -> None:
    bad, good = start(), start()
    servers = connect(bad, good)
    bad.change_answer = FAULTS[name]
    for _ in range(3):
        answers = servers.answers(requests(4))
        assert [(a.token_ids, a.logprobs) for a in answers] == [((7,), (-1.0,))] * 4
    assert [server.address for server in servers.alive] == [good.address]
    assert 1 <= servers.counts["faulty"] <= 4 and servers.counts["lost"] == 1


def test_a_faulty_server_gets_another_chance_with_the_next_weights(start: Any, connect: Any, tmp_path: Any) -> None:
    bad, good = start(), start()
    servers = connect(bad, good)
    bad.change_answer = FAULTS["NaN"]
    servers.answers(requests(4))
    bad.change_answer = lambda answer, name: answer
    servers.put(weights(tmp_path, 2))
    assert len(servers.alive) == 2


def test_where_every_server_is_faulty_the_run_ends_with_the_reason(
    start: Any, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "MAX_ATTEMPTS", 2)
    bad = start()
    servers = connect(bad)
    bad.change_answer = FAULTS["NaN"]
    with pytest.raises(RolloutError, match=f"lost 2 times, last by {bad.address}: it gives the log-probability nan"):
        servers.answers(requests(1))
    assert servers.counts["faulty"] == 2


@pytest.mark.parametrize(
    "about",
    [
        b"<html>It works!</html>", {}, [], {"version": 7}, {"idle_s": "long"}, {"idle_s": float("nan")},
        {"digest": None}, {"records_routing": "no"}, {"identity": []}, {"version": "../x"}, {"lora_rank": -1},
        {"context_tokens": True}, {"device": 0}, {"model_runner": 3},
    ],
)  # fmt: skip
def test_a_server_with_an_invalid_description_counts_as_missing(about: Any, start: Any, connect: Any) -> None:
    server = start()
    server.change_description = lambda valid: about if isinstance(about, bytes | list) or not about else valid | about
    with pytest.raises(ConfigError, match=f"no vLLM server answers at {server.address} "):
        connect(server, reconnect_s=0.0)


def with_server(answer: Answer, call: Callable[[VLLMServer], Awaitable[Any]], *, timeout_s: float = 60) -> Exception:
    """Return the error of a call of one server."""

    async def run(url: str) -> Any:
        async with http_client(TOKEN) as http:
            server = VLLMServer(url, http, timeout_s=timeout_s, token=TOKEN, vocab_size=10)
            server.version = "run-1-1"
            return await call(server)

    with hostile_server(answer) as hostile, pytest.raises(ServerLost) as raised:
        anyio.run(run, hostile.url)
    return raised.value


def complete(server: VLLMServer) -> Awaitable[Any]:
    return server.complete(ANY, "run-0-1", from_adapter=False, exact=True, sparse_layers=[])


@pytest.mark.parametrize(
    "answer",
    [
        endless(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" ", every_s=0.02),
        endless(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n", every_s=0.02),
    ],
)
def test_a_server_that_never_stops_answering_is_lost_at_the_deadline(
    answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = with_server(answer, complete, timeout_s=0.3)
    assert str(error) == "waited for its answer to /inference/v1/generate, which was not whole within 0.3 s"
    monkeypatch.setattr(client, "CONNECT_S", 0.3)
    assert "waited for its answer to /alignlab/about" in str(with_server(answer, VLLMServer.about))
    with hostile_server(answer) as hostile:
        assert not anyio.run(client.is_healthy, hostile.url)


def test_an_answer_without_an_end_is_faulty() -> None:
    error = with_server(endless(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536), complete)
    assert isinstance(error, ServerFaulty) and "it answers with more than" in str(error)


def test_weights_are_sent_within_a_deadline_for_their_size(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "upload_deadline_s", lambda num_bytes: num_bytes / 1000)
    path = tmp_path / "weights"
    path.write_bytes(b" " * 200)
    silent = endless(b"", b"", every_s=0.02)
    error = with_server(silent, lambda server: server.put("run-1-1", path), timeout_s=0.1)
    assert "waited for its answer to /alignlab/weights/run-1-1, which was not whole within 0.3 s" in str(error)
    wrong = always(response({"arrived": ["a", "b"]}))
    error = with_server(wrong, lambda server: server.put("run-1-1", path))
    assert str(error) == "it does not tell the digests of the weights that arrived"


def test_a_missing_file_of_weights_is_a_named_error(tmp_path: Any) -> None:
    with pytest.raises(RolloutError, match=r"the weights for vLLM's servers cannot be read from .*gone: No such file"):
        with_server(always(b""), lambda server: server.put("run-1-1", tmp_path / "gone"))


def test_the_token_is_in_no_message() -> None:
    for status in ("500 Oh", "200 OK"):
        error = with_server(always(response(f"you sent {TOKEN}\x1b[31m".encode(), status=status)), complete)
        assert "you sent ***" in str(error) and TOKEN not in str(error) and "\x1b" not in str(error)


def in_numpys_format(shape: str, values: bytes = b"", dtype: str = "<i2") -> bytes:
    header = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + values


def pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def as_text(content: bytes) -> str:
    return base64.b64encode(content).decode()


UNREADABLE = [
    b"", b"AAA", pickled(), pickle.dumps([]), in_numpys_format("(1000000, 1000000, 8)"),
    in_numpys_format("(-1, -1, 1)", b"  "), in_numpys_format("(1,)", b"  "),
    in_numpys_format("(1, 1, 1)", b"\xfe\xff"), in_numpys_format("(1, 1, 1)", b" " * 4, "<f4"),
    in_numpys_format("(1, 1, 1)", b"\xff\xff\xff\x7f", "<i4"),
]  # fmt: skip


@pytest.mark.parametrize("content", UNREADABLE)
def test_unreadable_experts_raise_and_allocate_nothing(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode_routing(bytes(4) + content)
    with pytest.raises(ValueError, match=r"\w"):
        decode_vllms_routing(as_text(content))


@pytest.mark.parametrize("text", [None, 7, "!!!!"])
def test_experts_that_are_no_text_in_base64_raise(text: Any) -> None:
    with pytest.raises(ValueError, match=r"\w"):
        decode_vllms_routing(text)


@pytest.mark.parametrize("shape", ["(3, 0, 2)", "(0, 1, 1000000000)"])
def test_experts_of_another_shape_are_a_faulty_answer(shape: str, start: Any, connect: Any) -> None:
    bad, good = start(), start()
    servers = connect(bad, good, layers=[0])
    for server in (bad, good):
        server.change_answer = of_choice(routed_experts=as_text(in_numpys_format("(3, 1, 2)", bytes(12))))
    assert servers.answers(requests(1))[0].routing.shape == (3, 1, 2)
    bad.change_answer = of_choice(routed_experts=as_text(in_numpys_format(shape)))
    assert servers.answers(requests(1))[0].routing.shape == (3, 1, 2)
    assert servers.counts["faulty"] == 1


@pytest.mark.parametrize(
    ("num_unknown", "num_experts", "hole", "num_bytes"),
    [(0, 256, False, 1), (5, 256, False, 1), (9, 8, False, 0), (0, 257, False, 2), (2, 8, True, 2)],
)
def test_recorded_experts_arrive_as_they_were_sent(
    num_unknown: int, num_experts: int, hole: bool, num_bytes: int
) -> None:
    record = torch.arange(9 * 3 * 2).view(9, 3, 2).fmod(num_experts).to(torch.int16)
    record[:num_unknown] = -1
    record[-1:] = -1 if num_unknown == 9 else num_experts - 1
    record[6, 1] = -1 if hole or num_unknown == 9 else 0
    content = encode_routing(record)
    assert torch.equal(recorded_experts(content, 9, [0, 4, 7]), record)
    assert torch.equal(recorded_experts(content, 10, [0, 4, 7])[:9], record)
    numbers = (9 - num_unknown) * 3 * 2
    assert len(content) == 4 + 128 + num_bytes * numbers


def test_a_record_that_begins_after_the_last_token_is_a_faulty_answer() -> None:
    content = encode_routing(torch.zeros(3, 1, 2, dtype=torch.int16))
    assert recorded_experts(content, 3, [0]).shape == (3, 1, 2)
    with pytest.raises(FaultyAnswer, match="tells no experts of the first 4 tokens, and there are 3"):
        recorded_experts((4).to_bytes(4, "little") + content[4:], 3, [0])
    with pytest.raises(FaultyAnswer, match="does not tell which experts it chose"):
        recorded_experts(content[:3], 3, [0])


@pytest.mark.parametrize(
    "address",
    ["http://user:secret@host:8000", "http://host:8000?token=secret", "http://host:8000#secret", "http://host:8000/secret"],
)
def test_a_secret_in_a_servers_address_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(ConfigError, match=r"^servers is ") as raised:
        VLLMServerSettings(servers=(address,))
    assert "secret" not in str(raised.value) or address.endswith("/secret")


def test_the_repr_of_a_server_process_does_not_show_the_token(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNLAB_SERVER_TOKEN", TOKEN)
    server = make_server(free_address(), tmp_path, {})
    assert TOKEN in server.environment.values() and TOKEN not in repr(server)


def test_a_server_reachable_from_other_machines_causes_a_warning(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("ALIGNLAB_SERVER_TOKEN", TOKEN)
    address = free_address()
    make_server(address, tmp_path, {})
    make_server(address.replace("127.0.0.1", "localhost"), tmp_path, {})
    assert caplog.records == []
    everywhere = address.replace("127.0.0.1", "0.0.0.0")
    make_server(everywhere, tmp_path, {})
    assert f"the server {everywhere} can be reached from other machines" in caplog.text


def test_a_server_that_never_comes_up_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "START_S", 0.1)
    monkeypatch.setattr(launch, "_REPORT_EVERY_S", 0.0)
    monkeypatch.setattr(launch, "_PAUSE_S", 0.05)
    messages: list[str] = []
    address = free_address()
    idle = ServerProcess(address, ["/bin/sleep", "600"], {})
    with pytest.raises(RolloutError, match=f"the server {address} did not answer for 0.1 s before it was up"):
        launch.keep_running([idle], messages.append)
    assert f"{address} is not up after" in messages[0] and "it is given 0.1 s to load" in messages[0]


@pytest.mark.parametrize("name", ["0400134314477881-0-1", "9c0f-0-1"])
def test_an_answer_is_known_by_its_name_behind_a_word_of_vllms(name: str) -> None:
    """A name without a letter, between numbers, would be read as another one from the word on."""
    choice = {"index": 0}
    for answered in (f"generate-tokens-{name}", f"generate-tokens-{name}-0a1b", name, ""):
        assert only_choice({"request_id": answered, "choices": [choice]}, name) == choice
    for other in (f"generate-tokens-{name}0", f"generate-tokens-a{name}", "generate-tokens-1-0-2"):
        with pytest.raises(FaultyAnswer, match="answers another request"):
            only_choice({"request_id": other, "choices": [choice]}, name)
