"""Connections of a server whose requests' heads are of a bounded size and come in a bounded time.

Uvicorn bounds neither under its faster parser, and what a client sends before its head is whole no middleware sees.
"""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn.config
from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_S = 20.0
MAX_HEAD_BYTES = 64 * 2**10


class BoundedHead:
    """Mixed into a protocol of uvicorn's: ends a connection on which no request begins in time or within the size.

    It also ends one whose client goes on sending after its request was answered.
    """

    cycle: Any
    transport: Any
    _head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """Begin to wait for a head."""
        super().connection_made(transport)  # type: ignore[misc]
        self._wait(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no more."""
        self._stop_waiting()
        super().connection_lost(exc)  # type: ignore[misc]

    def data_received(self, data: bytes) -> None:
        """Count what belongs to no request that is being answered."""
        super().data_received(data)  # type: ignore[misc]
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
            return
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.transport.abort()
        elif self._timer is None:
            self._wait(self.transport)

    def _wait(self, transport: Any) -> None:
        self._timer = asyncio.get_running_loop().call_later(HEAD_S, transport.abort)

    def _stop_waiting(self) -> None:
        self._head_bytes = 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class BoundedProtocol(BoundedHead, AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """Uvicorn's usual protocol, bounded."""


def use_bounded_connections() -> None:
    """Let the server that uvicorn starts in this process have such connections."""
    uvicorn.config.HTTP_PROTOCOLS["auto"] = f"{__name__}:{BoundedProtocol.__name__}"
