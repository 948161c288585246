"""Connections whose number is bounded, and whose clients send request heads and read answers in a bounded time.

Uvicorn's faster parser bounds neither size nor time of a head, and a middleware sees a request only when its head is
complete. Bodies have their deadlines in `asgi` and `uploads`.
"""

from __future__ import annotations

import asyncio
import itertools
import resource
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from alignlab.rollout.vllm.protocol import SLOWEST_BYTES_PER_S

HEAD_S = 20.0
MAX_HEAD_BYTES = 64 * 2**10
WRITE_S = 60.0
"""Time that a client may take, in all, to read the answer to a request, plus one second for each MiB of the answer."""
MAX_CONNECTIONS = 2**14
"""Connections at once, if the process may open twice as many files. A trainer has one for each requested sequence."""
_wait_numbers = itertools.count()


class BoundedConnection:
    """Mix-in of a uvicorn protocol that ends connections whose clients are too slow.

    It ends a connection without a complete head in time and size, one whose client does not read its answer in time,
    and one whose client goes on sending after its request was answered. If there are too many connections, it ends the
    one that has waited longest for its head.
    """

    connections: set[Any]
    cycle: Any
    transport: Any
    _head_bytes = 0
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _wait_number = 0
    _write_left_s = 0.0
    _timed_cycle: Any = None

    def connection_made(self, transport: Any) -> None:
        """Start the timer of the first head, and make room for the connection."""
        super().connection_made(transport)  # type: ignore[misc]
        transport.set_write_buffer_limits(high=0)  # so that `pause_writing` is called for any byte not yet read
        self._start_head_timer(transport)
        if len(self.connections) > max_connections():
            self._end_longest_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers."""
        self._stop_head_timer()
        self._stop_write_timer()
        super().connection_lost(exc)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        """Count the bytes that belong to no request being answered."""
        super().data_received(data)  # type: ignore[misc]
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_head_timer()
            if self.cycle is not self._timed_cycle:
                self._timed_cycle, self._write_left_s = self.cycle, WRITE_S
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()
        elif self._head_timer is None:
            self._start_head_timer(self.transport)

    def pause_writing(self) -> None:
        """Start the timer of an answer that the client has to read."""
        super().pause_writing()  # type: ignore[misc]
        self._write_left_s += self.transport.get_write_buffer_size() / SLOWEST_BYTES_PER_S
        self._write_timer = asyncio.get_running_loop().call_later(self._write_left_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Stop the timer of an answer that is read, and keep the time that is left."""
        if self._write_timer is not None:
            self._write_left_s = self._write_timer.when() - asyncio.get_running_loop().time()
        self._stop_write_timer()
        super().resume_writing()  # type: ignore[misc]

    def _end_longest_waiting(self) -> None:
        """End the connection that has waited longest for its head, which may be this one."""
        bounded = (connection for connection in self.connections if isinstance(connection, BoundedConnection))
        waiting = [connection for connection in bounded if connection._head_timer is not None]
        longest = min(waiting, key=lambda connection: connection._wait_number)
        longest._stop_head_timer()  # uvicorn forgets the connection later, and it must not be chosen again until then
        longest.transport.abort()

    def _start_head_timer(self, transport: Any) -> None:
        self._wait_number = next(_wait_numbers)
        self._head_timer = asyncio.get_running_loop().call_later(HEAD_S, transport.abort)

    def _stop_head_timer(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def max_connections() -> int:
    """Return the number of connections that this process may have at once."""
    max_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if max_files == resource.RLIM_INFINITY else min(MAX_CONNECTIONS, max(max_files // 2, 1))


class BoundedProtocol(BoundedConnection, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Uvicorn's usual protocol with bounded connections."""


def use_bounded_connections() -> None:
    """Make `BoundedProtocol` the one that uvicorn uses in this process."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
