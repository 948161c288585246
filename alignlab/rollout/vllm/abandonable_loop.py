"""Asynchronous work for callers in any thread, all of which can be abandoned at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

import anyio

from alignlab.rollout.background import LoopThread
from alignlab.rollout.requests import abandoned

T = TypeVar("T")


class AbandonableLoop:
    """An event loop in a thread of its own.

    Work is cancelled by anyio's scopes: httpx2 shields the closing of its connections from those, but not from
    asyncio's own cancellation.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str) -> None:
        self._loop = LoopThread(name)
        self._running: dict[asyncio.Task[Any], anyio.CancelScope] = {}

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Return the result of `work`; any thread may call this.

        Raises:
            RolloutError: `abandon` was called meanwhile.
        """
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Begin `work`, and return its future; see `run`."""
        return self._loop.submit(self._unless_abandoned(work))

    def abandon(self) -> None:
        """Cancel all work in flight; its callers get a RolloutError."""
        self._loop.submit(self._abandon()).result()

    def close(self, last: Coroutine[Any, Any, None]) -> None:
        """Cancel all work in flight, do `last`, and end the thread."""
        self._loop.submit(self._close(last)).result()
        self._loop.close()

    @contextmanager
    def can_be_abandoned(self) -> Iterator[None]:
        """Let `abandon` cancel the body, in a task of this loop; the task then goes on behind it."""
        task = asyncio.current_task()
        assert task is not None
        with anyio.CancelScope() as scope:
            self._running[task] = scope
            try:
                yield
            finally:
                del self._running[task]

    async def _unless_abandoned(self, work: Coroutine[Any, Any, T]) -> T:
        with self.can_be_abandoned():
            return await work
        raise abandoned()

    async def _abandon(self) -> None:
        for scope in self._running.values():
            scope.cancel()

    async def _close(self, last: Coroutine[Any, Any, None]) -> None:
        tasks = list(self._running)
        await self._abandon()
        await asyncio.gather(*tasks, return_exceptions=True)
        await last
