"""Locks for work that one process does while others wait: they log which process they wait for, with a deadline.

The kernel holds these locks (flock): a process that ends, however it ends, leaves none, and a clock that jumps or a
file that was left behind locks nobody out.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from alignlab.errors import DeadlineError
from alignlab.files.library_errors import writing

logger = logging.getLogger(__name__)
LONGEST_S = 24 * 3600.0
LONGEST_STOPPED_S = 600.0
_NOTICE_S = 30.0
_POLL_S = 0.05


@contextmanager
def one_at_a_time(path: Path, doing: str, *, longest_s: float = LONGEST_S) -> Iterator[None]:
    """Enter this context in one process at a time, for each path; the end of a process frees its lock.

    Args:
        path: the file or folder that is made; the lock is a file beside it.
        doing: description of the work for messages of waiting processes, such as "scores the examples by the
            reference".
        longest_s: longest time to wait, in seconds; at most `LONGEST_STOPPED_S` for a holder that is stopped, as by
            SIGSTOP.

    Raises:
        DeadlineError: another process held the lock for longer.
        DiskError: the lock's file cannot be written.
    """
    file = path.with_name(f"{path.name}.lock")
    with writing(file, "a lock"):
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666)  # of a pipe, too, it returns at once
    try:
        with writing(file, "a lock"):
            _acquire(lock, file, doing, longest_s)
            os.ftruncate(lock, 0)
            with os.fdopen(lock, "w", encoding="utf-8", closefd=False) as named:
                json.dump({"pid": os.getpid(), "host": socket.gethostname()}, named)
        yield
    finally:
        os.close(lock)


def _acquire(lock: int, file: Path, doing: str, longest_s: float) -> None:
    began = time.monotonic()
    stopped_since: float | None = None
    while True:
        if _is_acquired(lock, min(_NOTICE_S, longest_s - (time.monotonic() - began))):
            return
        checked_at = time.monotonic()
        holder, is_stopped = _holder(file)
        stopped_since = (stopped_since or checked_at) if is_stopped else None
        waited, stopped_s = checked_at - began, 0.0 if stopped_since is None else checked_at - stopped_since
        if waited >= longest_s or (is_stopped and stopped_s >= LONGEST_STOPPED_S):
            raise DeadlineError(
                f"waited {waited:.0f} s for {holder}, which {doing} and holds {file}; end that process or, where it is "
                "stopped, let it go on (kill -CONT), and start again"
            )
        logger.warning("waiting for %s, which %s, since %.0f s; at most %.0f s", holder, doing, waited, longest_s)


def _is_acquired(lock: int, patience_s: float) -> bool:
    """Lock a file; return False if another process still holds it after a time."""
    deadline = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
        time.sleep(_POLL_S)


def _holder(file: Path) -> tuple[str, bool]:
    """Return a description of the process that holds a lock, and True if it is known to be stopped."""
    try:
        holder = json.loads(file.read_text(encoding="utf-8"))
        number, host = int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, LookupError, TypeError):
        return "another process", False
    name = f"process {number} on {host}"
    if host != socket.gethostname():
        return name, False
    with suppress(psutil.Error):
        if psutil.Process(number).status() == psutil.STATUS_STOPPED:
            return f"{name} (stopped)", True
    return name, False
