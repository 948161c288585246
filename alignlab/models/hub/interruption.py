"""Work of one thread that another thread can stop, between two steps of its Python code.

A single step cannot be stopped, such as a call of native code that does not return.
"""

from __future__ import annotations

import ctypes
import math
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

_AGAIN_S = 2.0
_Result = TypeVar("_Result")


class Interruption:
    """A piece of work in the thread that creates this object."""

    class Interrupted(BaseException):
        """Ends the work. As a BaseException it passes through any `except Exception`."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._is_over = False
        self._raised = -math.inf

    def run(self, work: Callable[[], _Result]) -> _Result:
        """Return what `work` returns.

        Raises:
            Interrupted: the work was stopped.
        """
        try:
            try:
                return work()
            finally:
                self._close()
        except Interruption.Interrupted:
            self._close()  # the exception may have come during the first `_close`
            raise

    def raise_now(self) -> None:
        """Stop the work, from another thread; call this again, because the work may have swallowed the exception."""
        with self._lock:
            if not self._is_over and time.monotonic() > self._raised + _AGAIN_S:
                self._raised = time.monotonic()
                _raise_in(self._thread, Interruption.Interrupted)

    def _close(self) -> None:
        """Make sure that nothing is raised in the thread from now on."""
        while not self._is_over:
            with suppress(Interruption.Interrupted), self._lock:
                self._is_over = True
                if self._raised > -math.inf:
                    _raise_in(self._thread, None)  # cancel an exception that is still pending


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Let a thread raise before its next step; with None, cancel an exception that is still pending."""
    exception = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)
