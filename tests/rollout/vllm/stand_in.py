"""Stand-ins for vLLM servers that speak our protocol and compute nothing."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from alignlab.rollout.vllm.completions import Request
from alignlab.rollout.vllm.protocol import digest_of_all
from alignlab.rollout.vllm.weight_delivery import SentWeights

RUN = "run"


class StandIn(ThreadingHTTPServer):
    """A server that takes weights, and answers each request with one token.

    Attributes:
        num_puts: number of uploads of weights.
        may_answer_put: while this is unset, an upload is taken and not answered.
        put_began: an upload has arrived.
        num_requests: released by each request.
        together: requests that have to arrive before any is answered.
        change_description: changes the server's description of itself before it is sent.
        change_answer: changes an answer before it is sent; takes the answer and the request's name.
    """

    request_queue_size = 256
    daemon_threads = False

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.version: str | None = None
        self.num_puts = 0
        self.may_answer_put = threading.Event()
        self.may_answer_put.set()
        self.together = threading.Barrier(1)
        self.change_answer: Callable[[dict[str, Any], str], Any] = lambda answer, name: answer
        self.change_description: Callable[[dict[str, Any]], Any] = lambda about: about
        self.put_began, self.num_requests = threading.Event(), threading.Semaphore(0)
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
        """Break all connections, and stop listening."""
        self.shutdown()
        self.together.abort()
        self.may_answer_put.set()
        for connection in list(self._sockets):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """The server's side of one connection."""

    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self) -> None:
        server = self.server
        about: dict[str, Any] = {"version": server.version, "digest": digest_of_all({}), "idle_s": 1e9}
        about |= {"device": "cpu", "model_runner": 1}
        self._send(server.change_description(about | {"identity": {"vocab_size": 10}, "records_routing": False}))

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.server.num_puts += 1
        self.server.put_began.set()
        self.server.may_answer_put.wait()
        self.server.version = self.path.rpartition("/")[2]
        self._send({"arrived": {}})

    def do_POST(self) -> None:
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}").get("request_id", "")
        self.server.num_requests.release()
        with suppress(threading.BrokenBarrierError):
            self.server.together.wait()
        versions = [{"version": self.server.version, "start": 0, "end": 1}]
        logprobs = {"content": [{"logprob": -1.0}]}
        choice = {"token_ids": [7], "finish_reason": "stop", "stop_reason": None}
        choices = [choice | {"logprobs": logprobs, "weight_versions": versions}]
        self._send(self.server.change_answer({"choices": choices, "request_id": f"generate-tokens-{name}"}, name))

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _send(self, answer: Any) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        with suppress(OSError):
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)


def weights(folder: Path, number: int) -> SentWeights:
    path = folder / f"{number}.safetensors"
    path.write_bytes(b"weights")
    return SentWeights(f"{RUN}-{number}-{number}", path, {}, False)


def requests(count: int) -> list[Request]:
    return [Request((1, 2), {}) for _ in range(count)]
