"""An event loop in a thread, for synchronous callers of asynchronous functions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable
from concurrent.futures import Future, wait
from typing import Any

_GRACE_S = 1.0


class LoopThread:
    """An event loop in a daemon thread, which stays alive between calls, so that connections stay open.

    Args:
        name: name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._thread: threading.Thread | None = None

    def submit(self, awaitable: Awaitable[Any]) -> Future[Any]:
        """Run `awaitable` on the loop, and return its future."""
        return asyncio.run_coroutine_threadsafe(_awaited(awaitable), self._running())

    def replace_if_blocked(self) -> None:
        """Abandon the loop if a task blocks it; the next call starts another."""
        if self._loop is not None:
            probe = asyncio.run_coroutine_threadsafe(asyncio.sleep(0), self._loop)
            if not wait([probe], timeout=_GRACE_S).done:
                self._abandon()

    def close(self) -> None:
        """Cancel the running tasks, and end the thread."""
        thread = self._abandon()
        if thread is not None:
            thread.join(timeout=_GRACE_S)

    def _running(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            ready: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = Future()

            async def serve() -> None:
                stop = asyncio.Event()
                ready.set_result((asyncio.get_running_loop(), stop))
                await stop.wait()

            self._thread = threading.Thread(
                target=lambda: asyncio.run(serve()), name=self._name, daemon=True
            )
            self._thread.start()
            self._loop, self._stop = ready.result()
        return self._loop

    def _abandon(self) -> threading.Thread | None:
        """Signal the loop to end; return its thread."""
        thread = self._thread
        if self._loop is not None and self._stop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
        self._loop = self._stop = self._thread = None
        return thread


async def _awaited(awaitable: Awaitable[Any]) -> Any:
    return await awaitable
