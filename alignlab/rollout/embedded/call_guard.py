"""One call at a time: a busy or closed engine refuses a call, and an abandoned call ends before its next step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from alignlab.errors import RolloutError
from alignlab.rollout.requests import abandoned


class CallGuard:
    """The calls of an engine: at most one in flight; `abandon` and `close` may come from any thread.

    An engine that is closed frees what it holds, by `release`: at once, or at the end of the call in flight.
    """

    def __init__(self) -> None:
        self._in_use = threading.Lock()
        self._is_abandoned = self._is_closed = False

    @contextmanager
    def call(self, release: Callable[[], None]) -> Iterator[None]:
        """Hold the engine for one call.

        Raises:
            RolloutError: the engine was closed, or another call is in flight.
        """
        self.require_open()
        if not self._in_use.acquire(blocking=False):  # another thread was faster
            raise _busy()
        self._is_abandoned = False
        try:
            yield
        finally:
            self._in_use.release()
            if self._is_closed:
                self._release_if_idle(release)

    def abandon(self) -> None:
        """Make the call in flight raise before its next step."""
        self._is_abandoned = True

    def close(self, release: Callable[[], None]) -> None:
        """Refuse calls, abandon the one in flight, and free what the engine holds."""
        self._is_closed = True
        self.abandon()
        self._release_if_idle(release)

    def open(self) -> None:
        """Take calls again after `close`."""
        self._is_closed = False

    def require_wanted(self) -> None:
        """Raise a RolloutError if the call in flight was abandoned."""
        if self._is_abandoned:
            raise abandoned()

    def require_open(self) -> None:
        """Raise a RolloutError if the engine was closed, or a call is in flight."""
        if self._is_closed:
            raise RolloutError("the rollout engine was closed; update its weights before generating")
        self.require_idle()

    def require_idle(self) -> None:
        """Raise a RolloutError if a call is in flight."""
        if self._in_use.locked():
            raise _busy()

    def _release_if_idle(self, release: Callable[[], None]) -> None:
        if self._in_use.acquire(blocking=False):
            try:
                release()
            finally:
                self._in_use.release()


def _busy() -> RolloutError:
    return RolloutError(
        "the engine is generating already, and does one call at a time; read the stream to its end or close it"
    )
