"""Ctrl-C and SIGTERM as a flag that a loop reads between steps, so that it can save and stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

CAUGHT = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Interrupt:
    """Whether the process was asked to stop, and by which signal ("SIGINT", "SIGTERM")."""

    signal: str | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None


@contextmanager
def catch_interrupts() -> Iterator[Interrupt]:
    """Catch SIGINT and SIGTERM until the block ends; then the former handlers are back.

    A second SIGINT raises KeyboardInterrupt at once. Python lets only the main thread handle signals: in another
    thread nothing is caught, and the flag stays down.
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
