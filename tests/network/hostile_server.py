"""A server that answers as a test tells it, byte by byte, and ends with the test."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress


class HostileServer:
    """Each request is answered by the pieces that `answer` gives for the request, one send each.

    Attributes:
        url: http://127.0.0.1:PORT.
        requests: the bytes of every request so far.
        over: set once the test is over; a piece that waits for it is never sent.
    """

    def __init__(self, answer: Callable[[HostileServer, bytes], Iterable[bytes]]) -> None:
        self.answer, self.over, self.requests = answer, threading.Event(), list[bytes]()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        """Break all connections."""
        self.over.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._connections.append(connection)
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            while (request := _request(connection)) and not self.over.is_set():
                self.requests.append(request)
                for piece in self.answer(self, request):
                    connection.sendall(piece)
                if b"connection: close" in piece.lower():
                    return


def _request(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data:
        part = connection.recv(65536)
        if not part:
            return b""
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    length = int(lengths[0].partition(b":")[2]) if lengths else 0
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def response(body: bytes | object, *, status: str = "200 OK", **headers: str) -> bytes:
    """A whole answer; what is not bytes becomes JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    head = "\r\n".join([f"HTTP/1.1 {status}", f"Content-Length: {len(content)}", *lines])
    return head.encode() + b"\r\n\r\n" + content


Answer = Callable[[HostileServer, bytes], Iterable[bytes]]


@contextmanager
def hostile_server(answer: Answer) -> Iterator[HostileServer]:
    """A server for the time of this context."""
    server = HostileServer(answer)
    try:
        yield server
    finally:
        server.close()


def always(answer: bytes) -> Answer:
    """The same answer to every request."""
    return lambda server, request: [answer]


def endless(head: bytes, piece: bytes, *, every_s: float = 0.0) -> Answer:
    """An answer without an end, as fast as it is read or a piece every so often.

    For a client that does not give up it breaks off after 30 s or 64 MiB.
    """

    def answer(server: HostileServer, request: bytes) -> Iterator[bytes]:
        yield head
        for _ in range(int(30 / every_s) if every_s else 2**26 // len(piece)):
            if server.over.wait(every_s):
                return
            yield piece
        raise ConnectionAbortedError

    return answer
