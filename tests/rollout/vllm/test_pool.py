"""The pool of servers, over connections that break, against stand-ins that speak its protocol and compute nothing."""

from __future__ import annotations

import gc
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from alignlab.config.rollout import VLLMServerSettings
from alignlab.errors import RolloutError
from alignlab.rollout.vllm.completions import Request
from alignlab.rollout.vllm.server.client import ServerLost
from alignlab.rollout.vllm.server.handout import SentWeights
from alignlab.rollout.vllm.server.identity import digest_of_all
from alignlab.rollout.vllm.server.pool import ServerPool

RUN = "run"


class StandIn(ThreadingHTTPServer):
    """A server that takes weights, and answers each request with one token.

    Attributes:
        num_puts: how often it was sent weights.
        free: unset, it takes weights and does not say so.
        began: it was sent weights.
        asked: released by each request.
        together: how many requests it waits for before it answers any.
    """

    request_queue_size = 256
    daemon_threads = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.version: str | None = None
        self.num_puts = 0
        self.free = threading.Event()
        self.free.set()
        self.together = threading.Barrier(1)
        self.began, self.asked = threading.Event(), threading.Semaphore(0)
        self._sockets: set[socket.socket] = set()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def get_request(self) -> Any:
        request, client = super().get_request()
        self._sockets.add(request)
        return request, client

    def shutdown_request(self, request: Any) -> None:
        self._sockets.discard(request)
        super().shutdown_request(request)

    def die(self) -> None:
        """Break all connections, and listen no more."""
        self.shutdown()
        self.together.abort()
        self.free.set()
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """Its side of one connection."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        server = self.server
        about: dict[str, Any] = {"identity": {}, "version": server.version, "digest": digest_of_all({}), "idle_s": 1e9}
        self._tell(about | {"records_routing": False})

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.num_puts += 1
        self.server.began.set()
        self.server.free.wait()
        self.server.version = self.path.rpartition("/")[2]
        self._tell({"arrived": {}})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.asked.release()
        with suppress(threading.BrokenBarrierError):
            self.server.together.wait()
        versions = [{"version": self.server.version, "start": 0, "end": 1}]
        logprobs = {"content": [{"logprob": -1.0}]}
        choice = {"token_ids": [7], "finish_reason": "stop", "stop_reason": None}
        self._tell({"choices": [choice | {"logprobs": logprobs, "weight_versions": versions}], "request_id": "1"})

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _tell(self, what: dict[str, Any]) -> None:
        body = json.dumps(what).encode()
        with suppress(OSError):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


@pytest.fixture
def start() -> Iterator[Callable[..., StandIn]]:
    """Starts stand-ins, which end with the test."""
    started: list[StandIn] = []

    def make(port: int = 0) -> StandIn:
        started.append(StandIn(port))
        return started[-1]

    yield make
    for server in started:
        if server.socket.fileno() >= 0:
            server.die()


@pytest.fixture
def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ServerPool]]:
    """Pools of stand-ins that have been given weights."""
    monkeypatch.setenv("ALIGNLAB_SERVER_TOKEN", "a-token-of-the-tests")
    pools: list[ServerPool] = []

    def make(*servers: StandIn) -> ServerPool:
        addresses = tuple(server.address for server in servers)
        settings = VLLMServerSettings(servers=addresses, health_every_s=0.01, reconnect_s=30)
        pool = ServerPool(settings, {}, [], run=RUN, rank=0, check=lambda about: None)
        pools.append(pool)
        pool.open()
        pool.put(weights(tmp_path, 1))
        return pool

    yield make
    for pool in pools:
        pool.close()


def weights(folder: Path, number: int) -> SentWeights:
    path = folder / f"{number}.safetensors"
    path.write_bytes(b"weights")
    return SentWeights(f"{RUN}-{number}-{number}", path, {}, False)


def requests(count: int) -> list[Request]:
    return [Request((1, 2), {}) for _ in range(count)]


def one_is_being_given_the_weights(start: Any, connect: Any) -> tuple[ServerPool, StandIn, StandIn]:
    """(pool, its server that lives, one started again after a loss, which has not yet said that it has the weights)."""
    first, second = start(), start()
    pool = connect(first, second)
    second.die()
    while len(pool.alive) == 2:
        pool.answers(requests(4))
    again = start(second.server_port)
    again.free.clear()
    while not again.began.is_set():
        pool.answers(requests(1))
    return pool, first, again


def test_a_server_that_is_back_is_given_the_weights_once_however_short_the_requests(start: Any, connect: Any) -> None:
    """Requests on the others end, and giving it the weights goes on."""
    pool, _, again = one_is_being_given_the_weights(start, connect)
    for _ in range(20):
        assert [answer.token_ids for answer in pool.answers(requests(2))] == [(7,), (7,)]
    assert len(pool.alive) == 1
    again.free.set()
    while len(pool.alive) == 1:
        pool.answers(requests(1))
    assert (again.num_puts, again.version) == (1, f"{RUN}-1-1")
    assert pool.counts["returned"] == 1


def test_an_update_waits_for_the_weights_that_a_server_is_being_given(start: Any, connect: Any, tmp_path: Path) -> None:
    pool, first, again = one_is_being_given_the_weights(start, connect)
    update = threading.Thread(target=lambda: pool.put(weights(tmp_path, 2)))
    update.start()
    while first.version != f"{RUN}-2-2":
        pass
    assert again.version is None
    again.free.set()
    update.join()
    assert again.version == f"{RUN}-2-2" and len(pool.alive) == 2


def test_no_connection_is_left_open_where_requests_are_given_up_in_the_middle(start: Any, connect: Any) -> None:
    """The first request after a server's death tidies up its many connections, and is given up while it does."""
    server = start()
    pool = connect(server)
    server.together = threading.Barrier(60)
    pool.answers_of(pool.alive[0], requests(60))
    [known] = pool.alive
    server.die()
    with pytest.raises(ServerLost):
        pool.answers_of(known, requests(2))
    gc.collect()  # an open connection that nobody holds is an error of this test


def test_who_waits_when_all_is_given_up_hears_of_it(start: Any, connect: Any) -> None:
    server = start()
    pool = connect(server)
    server.together = threading.Barrier(3)  # the third never comes
    errors: list[Exception] = []

    def ask() -> None:
        try:
            pool.answers(requests(2))
        except RolloutError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert server.asked.acquire() and server.asked.acquire()
    pool.abandon()
    thread.join()
    assert [str(error) for error in errors] == ["generation was abandoned, because the run ends"]
    server.together.abort()
    assert pool.answers(requests(1))[0].token_ids == (7,)


def test_the_cause_of_an_error_survives_the_others_that_ran_beside_it(connect: Any, start: Any) -> None:
    """Of several requests to a server that is gone, one error is raised, and it tells the connection's."""
    server = start()
    pool = connect(server)
    [known] = pool.alive
    server.die()
    with pytest.raises(ServerLost, match="ConnectError") as raised:
        pool.answers_of(known, requests(3))
    assert isinstance(raised.value.__cause__, httpx2.ConnectError)
