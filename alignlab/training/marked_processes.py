"""Processes that a reward's process has started, known by a mark in their environment.

A daemon leaves its parent's session and group, and lives on when its parent has ended: neither leads to it. What it
keeps is the environment that it was started with.
"""

from __future__ import annotations

import os
import uuid
from contextlib import suppress

import psutil

MARK = "ALIGNLAB_REWARD_PROCESS"
_MAX_ROUNDS = 20
"""Of looking again, for one that was started meanwhile."""


def new_mark() -> str:
    """Return the value of the variable `MARK` for a process and all that it will start."""
    return uuid.uuid4().hex


def end_marked(mark: str) -> None:
    """End every other process of this user that has the mark."""
    for _ in range(_MAX_ROUNDS):
        marked = [process for process in psutil.process_iter() if process.pid != os.getpid() and _has(process, mark)]
        if not marked:
            return
        for process in marked:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(marked, timeout=1.0)


def _has(process: psutil.Process, mark: str) -> bool:
    """Whether a process has the mark; those of other users, and those that are over, cannot be asked."""
    try:
        return process.environ().get(MARK) == mark
    except (psutil.Error, OSError):
        return False
