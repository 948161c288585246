"""The training's side of a reward's process: starting it, talking to it through pipes, killing it."""

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

from alignlab.scoring.calls import RewardFailure
from alignlab.scoring.isolated.descendants import MARK, end_marked, new_mark
from alignlab.scoring.isolated.worker import read_frame, write_frame

_WORKER = "alignlab.scoring.isolated.worker"
_TAIL_CHARS = 500
_EXIT_S, _POLL_S = 2.0, 0.01


class Output:
    """Output of a process: the number of bytes, and the end of the text."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self._end = ""

    def read(self, stream: Any) -> None:
        """Read a stream to its end; called in a separate thread."""
        with stream, suppress(OSError):
            while block := os.read(stream.fileno(), 1 << 16):
                self.num_bytes += len(block)
                self._end = (self._end + block[-_TAIL_CHARS:].decode(errors="replace"))[-_TAIL_CHARS:]

    @property
    def tail(self) -> str:
        """The end of the output, without the white space around it."""
        return self._end.strip()


class RewardChild:
    """A running process with its pipes.

    Args:
        output: receives what the process prints.

    Raises:
        RewardFailure: the process cannot be started.
    """

    def __init__(self, output: Output) -> None:
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
            target=output.read, args=(self._process.stdout,), name="alignlab-reward-output", daemon=True
        )
        self._drain.start()
        self._ending, self._exchanging = threading.Lock(), threading.Lock()
        self._finalizer = weakref.finalize(self, _kill, self._process, mark)

    def exchange(self, request: Mapping[str, Any], limit: int) -> Any:
        """Send a request, and return the reply.

        Raises:
            EOFError, OSError: the process has ended.
            ValueError, RecursionError: the reply is longer than `limit` bytes, or no JSON.
        """
        with self._exchanging:
            write_frame(self.requests, request)
            return read_frame(self.replies, limit)

    def end_and_explain(self) -> str:
        """Kill a process that no longer answers, if it still runs, and return how it ended, for a message."""
        has_exited = self._finalizer.alive and _has_exited(self._process.pid)
        self.end()
        return _exit_reason(self._process.returncode) if has_exited else "stopped answering, and was ended"

    def end(self) -> None:
        """Kill the process and all that it has started."""
        with self._ending:
            if not self._finalizer.alive:
                return
            self._finalizer()
            self._drain.join(_EXIT_S)
            if self._exchanging.acquire(timeout=_EXIT_S):  # else a thread still reads from it
                os.close(self.requests)
                os.close(self.replies)


def _environment() -> dict[str, str]:
    """Return this process's environment, with its import path as PYTHONPATH."""
    folders = [os.path.abspath(folder) for folder in sys.path]  # "" is the working directory
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders)}


def _kill(process: subprocess.Popen[bytes], mark: str) -> None:
    """Kill a process, its group and its daemons."""
    with suppress(ProcessLookupError):  # the number cannot be reused before `wait`
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    end_marked(mark)


def _has_exited(pid: int) -> bool:
    """Return whether a child has ended; wait a moment for it, as its pipes close a little before it ends."""
    deadline = time.monotonic() + _EXIT_S
    with suppress(ChildProcessError):  # another thread has waited for the child
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return True
            time.sleep(_POLL_S)
    return False


def _exit_reason(status: int) -> str:
    if status >= 0:
        return f"has exited with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
