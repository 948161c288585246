"""Processes started by a reward's process, found by a mark in their environment.

A daemon leaves its parent's session and group and outlives its parent, so that neither of these leads to it. It keeps
the environment that it was started with.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress

import psutil

MARK = "ALIGNLAB_REWARD_PROCESS"
_MAX_ROUNDS = 20
"""Searches at most; each may find processes that were started during the one before."""


def new_mark() -> str:
    """Return a new value of the variable `MARK`, for a process and all that it will start."""
    return uuid.uuid4().hex


def end_marked(mark: str) -> None:
    """Kill every other process of this user that has the mark."""
    for _ in range(_MAX_ROUNDS):
        candidates = (process for process in psutil.process_iter() if process.pid != os.getpid())
        marked = [process for process in candidates if _has_mark(process, mark)]
        if not marked:
            return
        for process in marked:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(marked, timeout=1.0)


def _has_mark(process: psutil.Process, mark: str) -> bool:
    """Return whether a process has the mark; False for one that has ended or belongs to another user."""
    try:
        return process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False
