"""What a server does about clients without a token, without an end, and with more than it can take."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from alignlab.errors import ConfigError, DiskError, RolloutError
from alignlab.rollout.vllm.server import bodies, private_folders, uploads
from alignlab.rollout.vllm.server.access import VARIABLE, TokenGuard
from alignlab.rollout.vllm.server.asgi import Refusal, Scope
from alignlab.rollout.vllm.server.bodies import MAX_NESTING, nested_too_deeply
from alignlab.rollout.vllm.server.private_folders import PrivateFolder, require_private, temporary_folder
from alignlab.rollout.vllm.server.uploads import check_version, max_upload_bytes, received, routing_question
from alignlab.rollout.vllm.server.wire import adapter_config

uvicorn = pytest.importorskip("uvicorn")
TOKEN = "a-token-of-the-tests"
BEARS = f"Authorization: Bearer {TOKEN}\r\n"
Ask = Callable[..., tuple[int, Any]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """An application that says how long the body was."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    body = json.dumps(length).encode()
    head = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(params=["httptools", "h11"])
def port(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server with our guards, under each parser that uvicorn may have."""
    from alignlab.rollout.vllm.server import connections

    pytest.importorskip(request.param)
    monkeypatch.setenv(VARIABLE, TOKEN)
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    monkeypatch.setattr(bodies, "BODY_S", 0.5)
    protocol = uvicorn.importer.import_from_string(uvicorn.config.HTTP_PROTOCOLS[request.param])
    bounded = type("Bounded", (connections.BoundedHead, protocol), {})
    config = uvicorn.Config(TokenGuard(echo), http=bounded, lifespan="off", log_level="critical")
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    listener.close()


def status_of(port: int, *pieces: bytes, repeat: bytes = b"") -> int:
    """The status that a server answers to these bytes; 0 where it ends the connection without an answer.

    Args:
        repeat: sent again and again after the others.
    """
    with socket.create_connection(("127.0.0.1", port)) as client:
        client.settimeout(0.05 if repeat else 60)
        for piece in pieces:
            with suppress(ConnectionError):  # an answer may have come before the end
                client.sendall(piece)
        answer = b""
        while len(answer) < len("HTTP/1.1 200"):
            with suppress(TimeoutError):
                try:
                    part = client.recv(65536)
                except ConnectionError:
                    part = b""
                if not part:
                    return 0
                answer += part
            if not answer:
                with suppress(ConnectionError):
                    client.sendall(repeat)
        return int(answer[9:12])


def post(head: str = BEARS, body: bytes = b"{}", *, path: str = "/x") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_only_who_bears_the_token_is_answered(port: int) -> None:
    assert status_of(port, post()) == 200
    refused = [
        "", "Authorization: Bearer \r\n", "Authorization: Bearer\r\n", "Authorization:\r\n", "Authorization: \r\n",
        f"Authorization: {TOKEN}\r\n", f"Authorization: Basic {TOKEN}\r\n", f"Authorization: Bearer {TOKEN[:-1]}\r\n",
        BEARS + "Authorization: Bearer x\r\n", BEARS + BEARS, f"X: Bearer {TOKEN}\r\n",
    ]  # fmt: skip
    assert [status_of(port, post(head)) for head in refused] == [401] * len(refused)


def test_health_is_told_to_everybody_and_takes_no_body(port: int) -> None:
    assert status_of(port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n") == 200
    assert status_of(port, post("", path="/health")) == 413


@pytest.mark.parametrize("token", [None, "", "   ", "short"])
def test_a_server_without_a_token_does_not_start(token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if token is not None:
        monkeypatch.setenv(VARIABLE, token)
    with pytest.raises(ConfigError, match=f"the environment variable {VARIABLE} must hold a token"):
        TokenGuard(echo)


def test_a_body_is_bounded_before_it_is_read(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_BODY_BYTES", 100)
    monkeypatch.setattr(bodies.bounded_body, "__kwdefaults__", {"max_bytes": 100})
    assert status_of(port, post(body=b" " * 100)) == 200
    huge = f"POST /x HTTP/1.1\r\nHost: a\r\n{BEARS}Content-Length: 1000000000000\r\n\r\n".encode()
    assert status_of(port, huge) == 413
    chunked = f"POST /x HTTP/1.1\r\nHost: a\r\n{BEARS}Transfer-Encoding: chunked\r\n\r\n".encode()
    assert status_of(port, chunked, repeat=b"20\r\n" + b" " * 32 + b"\r\n") == 413


def test_a_body_that_is_never_whole_is_given_up(port: int) -> None:
    slow = f"POST /x HTTP/1.1\r\nHost: a\r\n{BEARS}Content-Length: 1000000\r\n\r\n".encode()
    assert status_of(port, slow, repeat=b" ") == 408


def test_a_head_that_is_never_whole_ends_the_connection(port: int) -> None:
    assert status_of(port) == 0  # not even a first byte
    assert status_of(port, b"GET / HTTP/1.1\r\n", repeat=b"X: y\r\n") in (0, 400)


def test_a_head_without_an_end_ends_the_connection(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.rollout.vllm.server import connections

    monkeypatch.setattr(connections, "HEAD_S", 600.0)
    assert status_of(port, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50_000) in (0, 400)


def test_a_connection_that_was_answered_can_be_used_again_but_not_for_ever(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        for _ in range(3):
            client.sendall(post())
            answer = b""
            while not answer.endswith(b"\r\n\r\n2"):  # the body's length, as the application says
                answer += client.recv(65536)
        client.sendall(b"POST /x HTTP/1.1\r\n")
        assert client.recv(65536) == b""


@pytest.mark.parametrize(
    ("body", "too_deep"),
    [
        (b"[" * 100_000, True), (b'{"a":' * 65 + b"1" + b"}" * 65, True), (b"[" * 65 + b"]" * 65, True),
        (b"[" * MAX_NESTING + b"]" * MAX_NESTING, False), (json.dumps(["["] * 1000).encode(), False),
        (json.dumps([[1]] * 1000).encode(), False), (b"[[" * 100 + b"no JSON", False),
    ],
)  # fmt: skip
def test_json_is_nested_as_deeply_as_a_parser_takes(body: bytes, too_deep: bool) -> None:
    assert nested_too_deeply(body) == too_deep


def test_deep_json_is_refused(port: int) -> None:
    assert status_of(port, post(body=b"[" * 100_000)) == 400


class Sent:
    """A request whose body comes as `parts` say."""

    def __init__(self, *parts: bytes | BaseException, length: object = None) -> None:
        size = sum(len(part) for part in parts if isinstance(part, bytes))
        headers = [] if length == "none" else [(b"content-length", str(size if length is None else length).encode())]
        self.scope: Scope = {"headers": headers}
        self.parts = parts

    async def stream(self) -> AsyncIterator[bytes]:
        for part in self.parts:
            if isinstance(part, BaseException):
                raise part
            yield part
            await anyio.sleep(0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place in which private folders are made."""
    monkeypatch.setattr(private_folders, "_IN_MEMORY", tmp_path)
    return tmp_path


def test_weights_are_received_into_a_folder_of_their_own(place: Path) -> None:
    folder = anyio.run(lambda: received(Sent(b"wei", b"ghts"), max_bytes=7))
    assert (Path(folder.name) / uploads.FILE_NAME).read_bytes() == b"weights"
    assert os.stat(folder.name).st_mode & 0o777 == 0o700
    folder.cleanup()
    assert list(place.iterdir()) == []


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (Sent(b"weights", length="none"), 411), (Sent(length=0), 411), (Sent(b"weights", length="-7"), 400),
        (Sent(b"weights", length="7.0"), 400), (Sent(b"weights", length="9" * 30), 400), (Sent(b"weights!"), 413),
        (Sent(b"weights", length=10**15), 413), (Sent(b"weigh", length=7), 400), (Sent(b"weights!", length=7), 400),
        (Sent(b"wei", DiskError("full"), length=7), 507), (Sent(b"wei", OSError(28, "No space"), length=7), 507),
        (Sent(b"wei", TimeoutError(), length=7), 408),
    ],
)  # fmt: skip
def test_weights_that_cannot_be_received_are_refused_and_leave_nothing(sent: Sent, status: int, place: Path) -> None:
    with pytest.raises(Refusal) as raised:
        anyio.run(lambda: received(sent, max_bytes=7))
    assert raised.value.status == status and list(place.iterdir()) == []


def test_weights_that_are_too_slow_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Sent):
        async def stream(self) -> AsyncIterator[bytes]:
            yield b"wei"
            await anyio.sleep_forever()

    monkeypatch.setattr(uploads, "_GRACE_S", 0.1)
    with pytest.raises(Refusal, match=r"the weights \(7 bytes\) did not arrive whole within 0 s") as raised:
        anyio.run(lambda: received(Stuck(length=7), max_bytes=7))
    assert raised.value.status == 408 and list(place.iterdir()) == []


def test_a_connection_that_breaks_off_leaves_nothing(place: Path) -> None:
    with pytest.raises(KeyError):
        anyio.run(lambda: received(Sent(b"wei", KeyError("disconnected"), length=7), max_bytes=7))
    assert list(place.iterdir()) == []


def test_weights_are_bounded_by_the_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b" " * 1000)
    assert 2000 <= max_upload_bytes(tmp_path) < 10**9


@pytest.mark.parametrize("version", ["", "..", "run", "run-1", "run-1-x", "run-1-1/..", "run-1-1\n", "r" * 99 + "-1-1"])
def test_a_version_that_is_none_is_refused(version: str) -> None:
    check_version("0f-1-2")
    with pytest.raises(Refusal, match="the version of weights must be RUN-VERSION-UPDATE"):
        check_version(version)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[" * 100_000, b"[]", b"7", b'{"name": "a"}', b'{"name": 7, "layers": [0]}',
        b'{"name": "", "layers": [0]}', b'{"name": "a", "layers": []}', b'{"name": "a", "layers": [true]}',
        b'{"name": "a", "layers": [-1]}', b'{"name": "a", "layers": [1e9]}', b'{"name": "a", "layers": "0"}', b"\xff",
    ],
)  # fmt: skip
def test_a_question_about_experts_that_is_none_is_refused(body: bytes) -> None:
    assert routing_question(b'{"name": "a", "layers": [0, 3]}') == ("a", [0, 3])
    with pytest.raises(Refusal) as raised:
        routing_question(body)
    assert raised.value.status == 400


@pytest.mark.parametrize("config", ["[]", "7", "[" * 100_000, "{", " " * 2**21 + "{}"])
def test_an_adapter_s_config_that_is_none_is_an_error(config: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "weights"
    save_file({"a": torch.zeros(1)}, path, metadata={"adapter_config": config})
    with pytest.raises((ValueError, RecursionError)):
        adapter_config(path)


def test_folders_of_dead_processes_go_and_all_others_stay(place: Path) -> None:
    """Whatever anybody makes there, and whichever number a process has in its namespace."""
    script = "import pathlib, sys; from alignlab.rollout.vllm.server.private_folders import PrivateFolder; " \
        "folder = PrivateFolder(pathlib.Path(sys.argv[1])); print(folder.name, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        stay = [place / f"alignlab-weights-{name}" for name in ("\u00b2-x", "99999999-x", "12345678")]
        for path in stay:
            path.mkdir(mode=0o700)
        stay[-1].chmod(0o755)
        (place / "alignlab-weights-file").write_text("")
        (place / "alignlab-weights-link").symlink_to(stay[0])
        os.mkfifo(place / "alignlab-weights-fifo")
        with temporary_folder(1) as own:
            assert theirs.is_dir() and Path(own).is_dir()
        other.kill()
    assert theirs.is_dir() and not Path(own).exists()
    with temporary_folder(1):
        assert not theirs.exists()
        assert all(path.is_dir() for path in stay) and len(list(place.iterdir())) == 7


def test_a_folder_goes_with_its_last_reference_and_not_with_a_forked_child(place: Path) -> None:
    folder = PrivateFolder(place)
    child = os.fork()
    if child == 0:
        folder.cleanup()
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(folder.name).is_dir()
    del folder
    assert list(place.iterdir()) == []


def test_without_room_it_is_said(place: Path) -> None:
    with pytest.raises(DiskError, match=r"weights of 931322574.62 GiB have no room in .*; free some space, or set TMP"):
        temporary_folder(10**18)


def test_weights_in_a_folder_that_others_can_enter_are_not_loaded(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    require_private(tmp_path / "weights")
    tmp_path.chmod(0o777)
    with pytest.raises(RolloutError, match="others may have written it"):
        require_private(tmp_path / "weights")
