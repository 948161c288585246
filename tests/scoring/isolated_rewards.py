"""Rewards of a test that run in a process of their own, where the worst of them do no harm."""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from alignlab.scoring.calls import InlineReward

STARTED = datetime.datetime.now().isoformat()


def lengths(*, completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(text)) for text in completions]


async def async_lengths(*, completions: list[str], answer: list[str | None], scale: float = 1.0) -> list[float | None]:
    return [None if gold is None else scale * len(text) for text, gold in zip(completions, answer, strict=True)]


class InCaller(InlineReward):
    """A reward that sees to its own time."""

    def __call__(self, completions: list[str], **_: Any) -> list[float]:
        return [0.0 for _ in completions]


class Counting:
    """An object that lives as long as its process."""

    def __init__(self, first: int, **unread: Any) -> None:
        self.next = first

    def __call__(self, completions: list[str], **columns: Any) -> list[int]:
        self.next += 1
        return [self.next] * len(completions)


def misbehaving(*, completions: list[str], how: str) -> list[Any]:
    """Fails as the first completion says, where it names a way; else says what happened to the arguments."""
    ways = {
        "exit": lambda: os._exit(0),
        "sys.exit": lambda: sys.exit(3),
        "raise": lambda: {}["the sky"],
        "segfault": lambda: ctypes.string_at(0),
        "abort": os.abort,
        "hang": threading.Event().wait,
        "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
        "memory": lambda: bytearray(1 << 33),
        "close": lambda: os.closerange(3, 256),
        "garbage": lambda: os.write(int(sys.argv[2]), b"\0" * 7 + b"\2[]"),
        "many": lambda: os.write(int(sys.argv[2]), b"\xff" * 8),
        "fork": _fork_and_exit,
    }
    print("printed by the reward", flush=True)
    if how in ways:
        ways[how]()
    if how == "unread":
        return [1.0, "2", None, float("nan")]
    return [1.0] * len(completions)


def misbehaves_by_row(*, completions: list[Any], how: list[str]) -> list[Any]:
    """`misbehaving`, whose way to fail is a column of the dataset."""
    return misbehaving(completions=completions, how=how[0])


def _fork_and_exit() -> None:
    """A child that outlives its parent, and holds all that it inherits."""
    if os.fork():
        os._exit(4)
    time.sleep(3600)


def loud(*, completions: list[str], **columns: Any) -> list[float]:
    for _ in range(64):
        print("x" * 65536)
    print("the end")
    return [0.0] * len(completions)


def process_of(*, completions: list[str], folder: str) -> list[float]:
    """Writes down its process and one that it has started."""
    child = os.spawnlp(os.P_NOWAIT, "sleep", "sleep", "3600")
    Path(folder, "pids.json").write_text(json.dumps([os.getpid(), child]))
    return [0.0] * len(completions)


def exits_once(*, completion_ids: list[list[int]], folder: str) -> list[float]:
    """Ends its process at its second call."""
    calls = len(list(Path(folder).iterdir()))
    Path(folder, str(calls)).touch()
    if calls == 1:
        os._exit(0)
    return [float(sum(ids) % 2) for ids in completion_ids]


def starts_daemons(*, completions: list[str], folder: str) -> list[float]:
    """Starts a session of its own, and a child of a child that has ended, and then fails to return."""
    session = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    reading, writing = os.pipe()
    if os.fork() == 0:
        os.setsid()
        os.write(writing, str(subprocess.Popen(["sleep", "3600"], stdout=subprocess.DEVNULL).pid).encode())
        os._exit(0)
    Path(folder, "pids.json").write_text(json.dumps([session.pid, int(os.read(reading, 20))]))
    os._exit(5)
