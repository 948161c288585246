"""A server refuses clients without the token, and requests without an end or of excessive size."""

from __future__ import annotations

import asyncio
import json
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest

from alignlab.errors import ConfigError, DiskError, RolloutError
from alignlab.files import private_folders
from alignlab.files.private_folders import PrivateFolder, require_private, temporary_folder
from alignlab.rollout.vllm.inside import asgi, uploads
from alignlab.rollout.vllm.inside.asgi import MAX_NESTING, Refusal, Scope, nested_too_deeply
from alignlab.rollout.vllm.inside.token_guard import TokenGuard
from alignlab.rollout.vllm.inside.uploads import (
    check_version,
    max_upload_bytes,
    parse_routing_question,
    receive_upload,
)
from alignlab.rollout.vllm.protocol import TOKEN_VARIABLE
from alignlab.rollout.vllm.serialization import adapter_config

uvicorn = pytest.importorskip("uvicorn")
TOKEN = "a-token-of-the-tests"
BEARS = f"Authorization: Bearer {TOKEN}\r\n"
LARGE = 32 * 2**20
"""More than the kernel takes for a client that does not read."""
Ask = Callable[..., tuple[int, Any]]


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the length of the body; at /large, followed by many spaces."""
    length, more = 0, True
    while more:
        message = await receive()
        length, more = length + len(message.get("body", b"")), message.get("more_body", False)
    body = json.dumps(length).encode() + b" " * (LARGE if scope["path"] == "/large" else 0)
    head = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture(params=["httptools", "h11"])
def server(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Return a server with our guards, with each parser that uvicorn may use."""
    from alignlab.rollout.vllm.inside import connections

    pytest.importorskip(request.param)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    monkeypatch.setattr(connections, "HEAD_S", 0.5)
    monkeypatch.setattr(asgi, "BODY_S", 0.5)
    protocol = uvicorn.importer.import_from_string(uvicorn.config.HTTP_PROTOCOLS[request.param])
    bounded = type("Bounded", (connections.BoundedConnection, protocol), {})
    options: Any = {"lifespan": "off", "log_level": "critical", "timeout_keep_alive": 60}
    config = uvicorn.Config(TokenGuard(echo), http=bounded, **options)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    server.install_signal_handlers = lambda: None
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listener])))
    thread.start()
    server.port = listener.getsockname()[1]
    yield server
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture
def port(server: Any) -> int:
    return int(server.port)


def status_of(port: int, *pieces: bytes, repeat: bytes = b"") -> int:
    """Return the status of a server's answer to these bytes; 0 if it ends the connection without an answer.

    Args:
        repeat: bytes sent again and again after the others.
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
                    chunk = client.recv(65536)
                except ConnectionError:
                    chunk = b""
                if not chunk:
                    return 0
                answer += chunk
            if not answer:
                with suppress(ConnectionError):
                    client.sendall(repeat)
        return int(answer[9:12])


def post(head: str = BEARS, body: bytes = b"{}", *, path: str = "/x") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: a\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def test_requests_without_the_token_are_refused(port: int) -> None:
    assert status_of(port, post()) == 200
    heads = [
        "", "Authorization: Bearer \r\n", "Authorization: Bearer\r\n", "Authorization:\r\n", "Authorization: \r\n",
        f"Authorization: {TOKEN}\r\n", f"Authorization: Basic {TOKEN}\r\n", f"Authorization: Bearer {TOKEN[:-1]}\r\n",
        BEARS + "Authorization: Bearer x\r\n", BEARS + BEARS, f"X: Bearer {TOKEN}\r\n",
    ]  # fmt: skip
    assert [status_of(port, post(head)) for head in heads] == [401] * len(heads)


def test_the_health_check_needs_no_token_and_takes_no_body(port: int) -> None:
    assert status_of(port, b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n") == 200
    assert status_of(port, post("", path="/health")) == 413


@pytest.mark.parametrize("token", [None, "", "   ", "short"])
def test_a_server_without_a_token_does_not_start(token: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    if token is not None:
        monkeypatch.setenv(TOKEN_VARIABLE, token)
    with pytest.raises(ConfigError, match=f"the environment variable {TOKEN_VARIABLE} must hold a token"):
        TokenGuard(echo)


def test_a_body_is_bounded_before_it_is_read(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "MAX_BODY_BYTES", 100)
    monkeypatch.setattr(asgi.bounded_body, "__kwdefaults__", {"max_bytes": 100})
    assert status_of(port, post(body=b" " * 100)) == 200
    huge = f"POST /x HTTP/1.1\r\nHost: a\r\n{BEARS}Content-Length: 1000000000000\r\n\r\n".encode()
    assert status_of(port, huge) == 413
    chunked = f"POST /x HTTP/1.1\r\nHost: a\r\n{BEARS}Transfer-Encoding: chunked\r\n\r\n".encode()
    assert status_of(port, chunked, repeat=b"20\r\n" + b" " * 32 + b"\r\n") == 413


def test_a_body_that_never_ends_times_out(port: int) -> None:
    slow = f"POST /x HTTP/1.1\r\nHost: a\r\n{BEARS}Content-Length: 1000000\r\n\r\n".encode()
    assert status_of(port, slow, repeat=b" ") == 408


def test_a_slow_head_ends_the_connection(port: int) -> None:
    assert status_of(port) == 0  # not even a first byte
    assert status_of(port, b"GET / HTTP/1.1\r\n", repeat=b"X: y\r\n") in (0, 400)


def test_a_large_head_ends_the_connection(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.rollout.vllm.inside import connections

    monkeypatch.setattr(connections, "HEAD_S", 600.0)
    assert status_of(port, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 50_000) in (0, 400)


def test_a_connection_can_be_used_again_until_a_head_is_slow(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port)) as client:
        for _ in range(3):
            client.sendall(post())
            answer = b""
            while not answer.endswith(b"\r\n\r\n2"):  # the body's length, as the application says
                answer += client.recv(65536)
        client.sendall(b"POST /x HTTP/1.1\r\n")
        assert client.recv(65536) == b""


def test_a_client_that_does_not_read_its_answer_in_time_is_let_go(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignlab.rollout.vllm.inside import connections

    monkeypatch.setattr(connections, "WRITE_S", 0.3)
    monkeypatch.setattr(connections, "SLOWEST_BYTES_PER_S", 2**40)
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(2)]
    for client in clients:
        client.sendall(post(path="/large"))
    _, slowly = clients
    num_read = len(slowly.recv(1024))
    while server.server_state.connections:
        select.select([], [], [], 0.01)
        num_read += len(slowly.recv(16))
    assert num_read < 10_000
    for client in clients:
        client.close()


def test_a_client_that_reads_its_answers_has_its_time_for_each(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.rollout.vllm.inside import connections

    monkeypatch.setattr(connections, "WRITE_S", 60.0)
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        for _ in range(3):
            client.sendall(post(path="/large"))
            head, _, body = client.recv(65536).partition(b"\r\n\r\n")
            num_left = LARGE + 1 - len(body)
            while num_left:
                num_left -= len(client.recv(min(num_left, 2**20)))
            assert head.startswith(b"HTTP/1.1 200")
            [connection] = server.server_state.connections
            assert 0 < connection._write_left_s <= 60.0 + 2 * LARGE / connections.SLOWEST_BYTES_PER_S


def test_too_many_connections_give_way_to_new_ones_and_not_those_that_are_answered(
    server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignlab.rollout.vllm.inside import connections

    monkeypatch.setattr(connections, "HEAD_S", 600.0)
    monkeypatch.setattr(asgi, "BODY_S", 600.0)
    monkeypatch.setattr(connections, "MAX_CONNECTIONS", 4)
    head, body = post().split(b"\r\n\r\n")
    with ExitStack() as stack:
        begun = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
        begun.sendall(head + b"\r\n\r\n")
        while not any(connection.cycle for connection in list(server.server_state.connections)):
            select.select([], [], [], 0.01)
        idle = [stack.enter_context(socket.create_connection(("127.0.0.1", server.port))) for _ in range(8)]
        for client in idle[:5]:
            client.settimeout(60)
            assert client.recv(1) == b"", "the oldest go first"
        assert status_of(server.port, post()) == 200
        begun.sendall(body)
        assert begun.recv(65536).startswith(b"HTTP/1.1 200")


def test_half_of_the_files_of_a_process_may_be_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    from alignlab.rollout.vllm.inside import connections

    limits = {connections.resource.RLIM_INFINITY: 2**14, 65535: 2**14, 1024: 512, 1: 1}
    for files, most in limits.items():
        monkeypatch.setattr(connections.resource, "getrlimit", lambda _, files=files: (files, files))
        assert connections.max_connections() == most


@pytest.mark.parametrize(
    ("body", "too_deep"),
    [
        (b"[" * 100_000, True), (b'{"a":' * 65 + b"1" + b"}" * 65, True), (b"[" * 65 + b"]" * 65, True),
        (b"[" * MAX_NESTING + b"]" * MAX_NESTING, False), (json.dumps(["["] * 1000).encode(), False),
        (json.dumps([[1]] * 1000).encode(), False), (b"[[" * 100 + b"no JSON", False),
    ],
)  # fmt: skip
def test_nested_too_deeply(body: bytes, too_deep: bool) -> None:
    assert nested_too_deeply(body) == too_deep


def test_deep_json_is_refused(port: int) -> None:
    assert status_of(port, post(body=b"[" * 100_000)) == 400


class Sent:
    """A request whose body comes in these chunks; an exception among them is raised."""

    def __init__(self, *chunks: bytes | BaseException, length: object = None) -> None:
        size = sum(len(chunk) for chunk in chunks if isinstance(chunk, bytes))
        headers = [] if length == "none" else [(b"content-length", str(size if length is None else length).encode())]
        self.scope: Scope = {"headers": headers}
        self.chunks = chunks

    async def stream(self) -> AsyncIterator[bytes]:
        for chunk in self.chunks:
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk
            await anyio.sleep(0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder in which private folders are made."""
    monkeypatch.setattr(private_folders, "_IN_MEMORY", tmp_path)
    return tmp_path


def test_weights_are_received_into_a_folder_of_their_own(place: Path) -> None:
    folder = anyio.run(lambda: receive_upload(Sent(b"wei", b"ghts"), max_bytes=7))
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
        anyio.run(lambda: receive_upload(sent, max_bytes=7))
    assert raised.value.status == status and list(place.iterdir()) == []


def test_weights_that_are_too_slow_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Sent):
        async def stream(self) -> AsyncIterator[bytes]:
            yield b"wei"
            await anyio.sleep_forever()

    monkeypatch.setattr(uploads, "upload_deadline_s", lambda num_bytes: 0.1)
    with pytest.raises(Refusal, match=r"the weights \(7 bytes\) did not arrive whole within 0 s") as raised:
        anyio.run(lambda: receive_upload(Stuck(length=7), max_bytes=7))
    assert raised.value.status == 408 and list(place.iterdir()) == []


def test_a_connection_that_breaks_off_leaves_nothing(place: Path) -> None:
    with pytest.raises(KeyError):
        anyio.run(lambda: receive_upload(Sent(b"wei", KeyError("disconnected"), length=7), max_bytes=7))
    assert list(place.iterdir()) == []


def test_weights_are_bounded_by_the_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b" " * 1000)
    assert 2000 <= max_upload_bytes(tmp_path) < 10**9


@pytest.mark.parametrize("version", ["", "..", "run", "run-1", "run-1-x", "run-1-1/..", "run-1-1\n", "r" * 99 + "-1-1"])
def test_an_invalid_version_is_refused(version: str) -> None:
    check_version("0f-1-2")
    with pytest.raises(Refusal, match="the version of weights must be RUN-POLICY_VERSION-ATTEMPT"):
        check_version(version)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[" * 100_000, b"[]", b"7", b'{"name": "a"}', b'{"name": 7, "layers": [0]}',
        b'{"name": "", "layers": [0]}', b'{"name": "a", "layers": []}', b'{"name": "a", "layers": [true]}',
        b'{"name": "a", "layers": [-1]}', b'{"name": "a", "layers": [1e9]}', b'{"name": "a", "layers": "0"}', b"\xff",
    ],
)  # fmt: skip
def test_an_invalid_question_about_experts_is_refused(body: bytes) -> None:
    assert parse_routing_question(b'{"name": "a", "layers": [0, 3]}') == ("a", [0, 3])
    with pytest.raises(Refusal) as raised:
        parse_routing_question(body)
    assert raised.value.status == 400


@pytest.mark.parametrize("config", ["[]", "7", "[" * 100_000, "{", " " * 2**21 + "{}"])
def test_an_invalid_config_of_an_adapter_is_an_error(config: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    path = tmp_path / "weights"
    save_file({"a": torch.zeros(1)}, path, metadata={"adapter_config": config})
    with pytest.raises((ValueError, RecursionError)):
        adapter_config(path)


def test_only_folders_of_dead_processes_are_removed(place: Path) -> None:
    script = "import pathlib, sys; from alignlab.files.private_folders import PrivateFolder; " \
        "folder = PrivateFolder(pathlib.Path(sys.argv[1])); print(folder.name, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(place)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        folder_of_other = Path(process.stdout.readline().strip())
        stay = [place / f"alignlab-weights-{name}" for name in ("\u00b2-x", "99999999-x", "12345678")]
        for path in stay:
            path.mkdir(mode=0o700)
        stay[-1].chmod(0o755)
        (place / "alignlab-weights-file").write_text("")
        (place / "alignlab-weights-link").symlink_to(stay[0])
        os.mkfifo(place / "alignlab-weights-fifo")
        with temporary_folder(1) as new_folder:
            assert folder_of_other.is_dir() and Path(new_folder).is_dir()
        process.kill()
    assert folder_of_other.is_dir() and not Path(new_folder).exists()
    with temporary_folder(1):
        assert not folder_of_other.exists()
        assert all(path.is_dir() for path in stay) and len(list(place.iterdir())) == 7


def test_a_folder_is_removed_with_its_last_reference_and_not_by_a_forked_child(place: Path) -> None:
    folder = PrivateFolder(place)
    child = os.fork()
    if child == 0:
        folder.cleanup()
        os._exit(0)
    os.waitpid(child, 0)
    assert Path(folder.name).is_dir()
    del folder
    assert list(place.iterdir()) == []


def test_a_folder_removed_before_it_is_locked_is_made_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    make = tempfile.mkdtemp

    def make_and_remove_first(**options: Any) -> str:
        names.append(make(**options))
        if len(names) == 1:
            os.rmdir(names[0])
        return names[-1]

    monkeypatch.setattr(tempfile, "mkdtemp", make_and_remove_first)
    with temporary_folder(1) as name:
        assert [name] == names[1:] and Path(name).is_dir()


def test_a_full_disk_is_an_error(place: Path) -> None:
    with pytest.raises(DiskError, match=r"weights of 931322574.62 GiB have no room in .*; free some space, or set TMP"):
        temporary_folder(10**18)


def test_weights_in_a_folder_that_others_can_enter_are_not_loaded(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    require_private(tmp_path / "weights")
    tmp_path.chmod(0o777)
    with pytest.raises(RolloutError, match="others may have written it"):
        require_private(tmp_path / "weights")
