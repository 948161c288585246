"""Work of one thread that another can stop, between any two steps of its Python code.

Nothing stops a single step, such as a call of native code that does not return.
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
    """One piece of work of the thread that makes this."""

    class Interrupted(BaseException):
        """Ends the work; no `except Exception` in it is in the way."""

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self._lock = threading.Lock()
        self._is_over = False
        self._raised = -math.inf

    def run(self, work: Callable[[], _Result]) -> _Result:
        """Return what `work` returns.

        Raises:
            Interrupted: it was stopped.
        """
        try:
            try:
                return work()
            finally:
                self._close()
        except Interruption.Interrupted:
            self._close()  # where it was stopped on the way out
            raise

    def raise_now(self) -> None:
        """Stop the work, from another thread; again after a while, should a step of it have lost the exception."""
        with self._lock:
            if not self._is_over and time.monotonic() > self._raised + _AGAIN_S:
                self._raised = time.monotonic()
                _raise_in(self._thread, Interruption.Interrupted)

    def _close(self) -> None:
        """Let nothing be raised in the thread any more."""
        while not self._is_over:
            with suppress(Interruption.Interrupted), self._lock:
                self._is_over = True
                if self._raised > -math.inf:
                    _raise_in(self._thread, None)  # what was raised after the last step


def _raise_in(thread: int, error: type[BaseException] | None) -> None:
    """Let a thread raise before its next step; with None, take back what it has not raised yet."""
    given = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), given)
