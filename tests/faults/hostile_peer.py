"""A server of raw sockets that behaves as it is told: slow, endless, torn, or with answers that are none."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import cache
from types import TracebackType
from typing import Any, Self

Behaviour = Callable[[socket.socket], None]
_DRIP_S = 0.2
_GIB = 1 << 30
_LONGEST_S = 120.0


def says(what: Any, status: str = "200 OK", kind: str = "application/json", headers: str = "") -> Behaviour:
    """An ordinary answer: JSON of a value, or bytes as they are."""
    body = what if isinstance(what, bytes) else json.dumps(what).encode()
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return lambda connection: connection.sendall(head.encode() + body)


def _raw(text: bytes) -> Behaviour:
    return lambda connection: connection.sendall(text)


def _dripping(first: bytes, drop: bytes) -> Behaviour:
    def drip(connection: socket.socket) -> None:
        connection.sendall(first)
        until = time.monotonic() + _LONGEST_S
        while time.monotonic() < until:
            connection.sendall(drop)
            time.sleep(_DRIP_S)

    return drip


def _endless(first: bytes, block: bytes) -> Behaviour:
    def send(connection: socket.socket) -> None:
        connection.sendall(first)
        for _ in range(8 * _GIB // len(block)):
            connection.sendall(block)

    return send


def _silent(connection: socket.socket) -> None:
    while connection.recv(1 << 16):
        pass


def _resetting(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


@cache
def _bomb() -> bytes:
    return gzip.compress(bytes(_GIB), compresslevel=6)


def _zipped(connection: socket.socket, body: bytes) -> None:
    connection.sendall(_OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


_OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
WIRE: dict[str, Behaviour] = {
    "closes": lambda connection: None, "resets": _resetting, "silent": _silent, "half-a-line": _raw(b"HTTP/1.1 200"),
    "dripping-status": _dripping(b"H", b"T"), "dripping-headers": _dripping(_OK, b"X-A: b\r\n"),
    "dripping-body": _dripping(_OK + b"Content-Length: 100000\r\n\r\n", b" "),
    "dripping-chunks": _dripping(_OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "endless-headers": _endless(_OK, b"X-A: " + b"b" * 1000 + b"\r\n"),
    "endless-header": _endless(_OK + b"X-A: ", b"b" * 65536), "endless-body": _endless(_OK + b"\r\n", b" " * 65536),
    "endless-chunks": _endless(_OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"),
    "long-body": _endless(_OK + b"Content-Length: 8589934592\r\n\r\n", b" " * 65536),
    "short-body": _raw(_OK + b"Content-Length: 100\r\n\r\n{}"),
    "negative-length": _raw(_OK + b"Content-Length: -5\r\n\r\n{}"),
    "two-lengths": _raw(_OK + b"Content-Length: 2\r\nContent-Length: 7\r\n\r\n{}"),
    "bad-chunk": _raw(_OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n"), "http-0.9": _raw(b"{}"),
    "binary": _raw(bytes(range(256)) * 40),
    "gzip-bomb": lambda connection: _zipped(connection, _bomb()),
    "gzip-that-is-none": _raw(_OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"),
    "unknown-encoding": _raw(_OK + b"Content-Encoding: zstd-x\r\nContent-Length: 2\r\n\r\n{}"),
    "redirect-loop": _raw(b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"),
    "continue-for-ever": _endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 100),
    "switching": _raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"),
    "no-content": _raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
}  # fmt: skip
"""What goes wrong below an answer."""
ANSWERS: dict[str, Behaviour] = {
    "html": says(b"<html>It works!</html>", kind="text/html"), "empty": says(b""), "null": says(None), "list": says([]),
    "number": says(7), "text": says("x"), "object": says({}),
    "not-json": says(b"{'a': 1}"), "cut": says(b'{"choices": [{"mess'), "not-utf-8": says(b'{"a": "\xff\xfe"}'),
    "deep": says(b"[" * 200_000), "deep-and-closed": says(b"[" * 200_000 + b"]" * 200_000),
    "digits": says(b'{"choices": ' + b"9" * 10_000 + b"}"),
    "huge-float": says(b'{"choices": [{"message": {"content": 1e999}}]}'),
    "surrogate": says(b'{"choices": [{"message": {"content": "\\ud800"}}]}'),
    "busy": says({"error": "busy"}, "429 Too Many Requests", headers="Retry-After: 1000000\r\n"),
    "busy-till-a-date": says({}, "503 Unavailable", headers="Retry-After: Fri, 31 Dec 9999 23:59:59 GMT\r\n"),
    "busy-nonsense": says({}, "429 Too Many Requests", headers="Retry-After: -1e999\r\n"),
    "fault": says(b"x" * 1_000_000, "500 Internal Server Error"), "forbidden": says({}, "403 Forbidden"),
    "unauthorized": says({}, "401 Unauthorized"), "not-found": says({}, "404 Not Found"),
    "unprocessable": says({"detail": [{"a": 1}]}, "422 Unprocessable"), "teapot": says(b"", "418 I'm a teapot"),
    "status-999": says({}, "999 What"),
    "many-cookies": says({}, headers="".join(f"Set-Cookie: a{i}={i}\r\n" for i in range(90))),
}  # fmt: skip
"""Answers that are none."""


def _judged(**choice: Any) -> Behaviour:
    return says({"choices": [choice]})


def _listed(*tokens: Any) -> Behaviour:
    return _judged(message={"content": "1"}, logprobs={"content": [{"top_logprobs": list(tokens)}]})


JUDGED: dict[str, Behaviour] = {
    "nan": _listed({"token": "1", "logprob": math.nan}, {"token": "2", "logprob": -1.0}),
    "infinite": _listed({"token": "1", "logprob": math.inf}, {"token": "2", "logprob": -1.0}),
    "above-0": _listed({"token": "1", "logprob": 5.0}, {"token": "2", "logprob": -1.0}),
    "huge": _listed({"token": "1", "logprob": 1e308}, {"token": "2", "logprob": 1e308}),
    "text": _listed({"token": "1", "logprob": "x"}), "null": _listed({"token": "1", "logprob": None}),
    "no-token": _listed({"logprob": -1.0}), "not-listed": _listed({"token": "x", "logprob": -1.0}),
    "number-token": _listed({"token": 1, "logprob": -1.0}), "nothing-listed": _listed(),
    "listed-is-null": _judged(logprobs={"content": [{"top_logprobs": None}]}),
    "minus-infinite": _listed({"token": "1", "logprob": -math.inf}, {"token": "2", "logprob": -math.inf}),
    "no-logprobs": _judged(message={"content": "1"}), "no-message": _judged(),
    "null-content": _judged(message={"content": None}),
    "list-content": _judged(message={"content": [{"type": "text", "text": "1"}]}),
    "number-content": _judged(message={"content": 7}), "long-content": _judged(message={"content": "1" * 30_000_000}),
    "no-choices": says({"choices": []}), "choices-null": says({"choices": None}),
    "choice-null": says({"choices": [None]}), "choices-object": says({"choices": {"0": {}}}),
    "true": _listed({"token": "1", "logprob": True}),
}  # fmt: skip
"""Answers of a judge that cannot be believed."""
_GENERATED = {
    "token_ids": [7], "finish_reason": "stop", "stop_reason": None, "logprobs": {"content": [{"logprob": -1.0}]},
    "weight_versions": [{"version": "run-1-1", "start": 0, "end": 1}],
}  # fmt: skip


def _generated(**changes: Any) -> Behaviour:
    return says({"choices": [_GENERATED | changes], "request_id": "1"})


def _scored(*logprobs: Any) -> Behaviour:
    return _generated(logprobs={"content": [{"logprob": value} for value in logprobs]})


GENERATED: dict[str, Behaviour] = {
    "nan": _scored(math.nan), "infinite": _scored(-math.inf), "above-0": _scored(3.0), "text": _scored("x"),
    "null": _scored(None), "two-for-one": _scored(-1.0, -1.0), "none-for-one": _scored(), "huge": _scored(-1e308),
    "true": _scored(True),
    "no-logprobs": _generated(logprobs=None), "logprobs-list": _generated(logprobs=[]),
    "id-huge": _generated(token_ids=[10**9]), "id-negative": _generated(token_ids=[-1]),
    "id-text": _generated(token_ids=["7"]), "id-fraction": _generated(token_ids=[7.5]),
    "id-true": _generated(token_ids=[True]), "ids-null": _generated(token_ids=None),
    "ids-text": _generated(token_ids="777"), "no-ids": _generated(token_ids=[]),
    "ids-beyond-the-limit": _generated(token_ids=[7] * 100_000),
    "reason": _generated(finish_reason="because"), "reason-null": _generated(finish_reason=None),
    "reason-list": _generated(finish_reason=["stop"]), "versions-none": _generated(weight_versions=None),
    "versions-text": _generated(weight_versions="run-1-1"),
    "version-old": _generated(weight_versions=[{"version": "run-0-0", "start": 0, "end": 1}]),
    "version-other-run": _generated(weight_versions=[{"version": "other-1-1", "start": 0, "end": 1}]),
    "version-odd": _generated(weight_versions=[{"version": "x", "start": 0, "end": 1}]),
    "span-huge": _generated(weight_versions=[{"version": "run-1-1", "start": 0, "end": 10**12}]),
    "span-backwards": _generated(weight_versions=[{"version": "run-1-1", "start": 5, "end": 1}]),
    "no-choices": says({"choices": [], "request_id": "1"}),
    "two-choices": says({"choices": [_GENERATED, _GENERATED], "request_id": "1"}),
    "stop-reason": _generated(stop_reason={"a": 1}),
}  # fmt: skip
"""Answers of a server of rollouts that cannot be believed."""
ABOUT = {"identity": {}, "version": None, "digest": "", "idle_s": 1e9, "records_routing": False}


class HostilePeer:
    """A server on loopback that behaves in one way on some paths, and well on the others.

    Args:
        hostile: by the beginning of a request, such as "POST /inference", what it does then.
        well: the same, where it behaves.
    """

    def __init__(self, hostile: Mapping[str, Behaviour], well: Mapping[str, Behaviour]) -> None:
        self._behaviours = {**well, **hostile}
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = self._socket.getsockname()[1]
        self._connections: set[socket.socket] = set()
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for end in (self._socket, *self._connections):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self._connections.add(connection)
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            line = _request(connection)
            behaviour = next((what for start, what in self._behaviours.items() if line.startswith(start)), None)
            (behaviour or says({}, "404 Not Found"))(connection)
            connection.shutdown(socket.SHUT_WR)
            _silent(connection)


def _request(connection: socket.socket) -> str:
    """Read a request whole; returns its first line."""
    read = b""
    while b"\r\n\r\n" not in read:
        block = connection.recv(1 << 16)
        if not block:
            return ""
        read += block
    head, _, body = read.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
    while len(body) < int(lengths[0] if lengths else 0):
        body += connection.recv(1 << 16)
    return head.split(b"\r\n")[0].decode(errors="replace")
