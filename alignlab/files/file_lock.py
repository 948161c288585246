"""Locks for work that one process does while others wait: they log which process they wait for, with a deadline."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from alignlab.errors import DeadlineError
from alignlab.files.library_errors import writing

logger = logging.getLogger(__name__)
LONGEST_S = 24 * 3600.0
LONGEST_STOPPED_S = 600.0
_NOTICE_S = 30.0


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
    lock = FileLock(file)
    with writing(file, "a lock"):
        _acquire(lock, file, doing, longest_s)
    try:
        with writing(file, "a lock"):
            file.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}), encoding="utf-8")
        yield
    finally:
        lock.release()


def _acquire(lock: FileLock, file: Path, doing: str, longest_s: float) -> None:
    began = time.monotonic()
    stopped_since: float | None = None
    while True:
        try:
            lock.acquire(timeout=min(_NOTICE_S, max(longest_s - (time.monotonic() - began), 0.0)))
            return
        except Timeout:
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
