"""A child process that answers through a pipe, and its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from alignlab.training.marked_processes import MARK, end_marked, new_mark
from alignlab.training.reward_calls import RewardFailure
from alignlab.training.reward_worker import read_frame, write_frame

_WORKER = "alignlab.training.reward_worker"
_TAIL_CHARS = 500
_EXIT_S, _LOOK_S = 2.0, 0.01


class Printed:
    """What a process prints: counted, and forgotten but for its end."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._end = ""

    def read(self, stream: Any) -> None:
        """Read to the end of a stream, in a thread of its own."""
        with stream, suppress(OSError):
            while part := os.read(stream.fileno(), 1 << 16):
                self.num_bytes += len(part)
                self._end = (self._end + part[-_TAIL_CHARS:].decode(errors="replace"))[-_TAIL_CHARS:]

    @property
    def tail(self) -> str:
        """The last of it."""
        return self._end.strip()


class RewardChild:
    """A running process with its pipes.

    Args:
        printed: takes what it prints.

    Raises:
        RewardFailure: it cannot be started.
    """

    def __init__(self, printed: Printed) -> None:
        requests, self.requests = os.pipe()
        self.replies, replies = os.pipe()
        mark = new_mark()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", _WORKER, str(requests), str(replies), str(os.getpid())],
                pass_fds=(requests, replies), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, start_new_session=True, env=_environment() | {MARK: mark},
            )  # fmt: skip
        except OSError as error:
            raise RewardFailure("exited", f"its process cannot be started: {error}") from error
        finally:
            os.close(requests)
            os.close(replies)
        self._drain = threading.Thread(
            target=printed.read, args=(self._process.stdout,), name="alignlab-reward-output", daemon=True
        )
        self._drain.start()
        self._ending, self._exchanging = threading.Lock(), threading.Lock()
        self._finalizer = weakref.finalize(self, _kill, self._process, mark)

    def exchange(self, request: Mapping[str, Any], limit: int) -> Any:
        """Send a message, and return the reply.

        Raises:
            EOFError, OSError: the process is over.
            ValueError, RecursionError: the reply is longer than `limit` bytes, or no JSON.
        """
        with self._exchanging:
            write_frame(self.requests, request)
            return read_frame(self.replies, limit)

    def ending(self) -> str:
        """Say how the process, which no longer answers, has ended, and end it if it has not."""
        by_itself = self._finalizer.alive and _has_exited(self._process.pid)
        self.end()
        return _ending(self._process.returncode) if by_itself else "stopped answering, and was ended"

    def end(self) -> None:
        """End the process and all that it has started."""
        with self._ending:
            if not self._finalizer.alive:
                return
            self._finalizer()
            self._drain.join(_EXIT_S)
            if self._exchanging.acquire(timeout=_EXIT_S):  # a thread that still reads must not read another file
                os.close(self.requests)
                os.close(self.replies)


def _environment() -> dict[str, str]:
    """This process's environment, and its places to import from."""
    folders = [os.path.abspath(folder) for folder in sys.path]  # "" is the working directory
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)}


def _kill(process: subprocess.Popen[bytes], mark: str) -> None:
    """End a process, its group and its daemons. Not waited for until then, its number cannot belong to another."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end_marked(mark)


def _has_exited(pid: int) -> bool:
    """Whether a child is over, or is within a moment: its pipes are closed a little earlier."""
    deadline = time.monotonic() + _EXIT_S
    with suppress(ChildProcessError):  # ended by another thread meanwhile
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            time.sleep(_LOOK_S)
    return False


def _ending(status: int) -> str:
    if status >= 0:
        return f"has exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
