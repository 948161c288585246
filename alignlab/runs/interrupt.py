"""Ctrl-C and SIGTERM: a flag that a loop reads between steps, to save and stop; elsewhere an exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

CAUGHT = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """A request to stop the process.

    Attributes:
        signal: name of the signal received, "SIGINT" or "SIGTERM"; None if there was none.
    """

    signal: str | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None


@contextmanager
def catch_interrupts() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM within this context; afterwards the former handlers are restored.

    A second SIGINT raises KeyboardInterrupt at once. Python lets only the main thread handle signals: in another
    thread nothing is caught.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and interrupt.signal == "SIGINT":
            raise KeyboardInterrupt
        interrupt.signal = signal.Signals(number).name

    former = {number: signal.signal(number, handle) for number in CAUGHT}
    try:
        yield interrupt
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Raise KeyboardInterrupt at SIGTERM within the block, as Ctrl-C does, so that what is open is closed and recorded.

    A second SIGTERM ends the process at once. Where SIGTERM is ignored or has a handler already, and in other threads
    than the main one, nothing changes.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
