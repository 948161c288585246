"""The end of a command: its exit status, and the closing line on standard output.

| status | of `alignlab train` |
|---|---|
| 0 | every step is done, and the model and the report are written; `learnt` in the closing line may still be false |
| 1 | an error without a name, with its traceback; or code that the run called, such as a reward, ended the process |
| 2 | a wrong command line, or an error that has a name |
| 2 | not one update was made: the closing line says why in `reason`, and the saved weights are those of the start |
| 2 | standard output did not accept all that was written to it |
| 130 | stopped by SIGINT (Ctrl-C) or SIGTERM, on this rank or another: `--resume` continues |
| 128 + n | killed by signal n, as the shell reports it: `--resume` continues from the last checkpoint |

Whatever the status, the last completed step is saved if possible: see `alignlab/runs/README.md`.
"""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn, TextIO

OWN_THREADS = ("alignlab-reward", "alignlab-rollouts")
"""Names of the threads whose errors are raised again in the main thread."""


class ExitStatus(IntEnum):
    """Exit statuses of every command."""

    DONE = 0
    UNEXPECTED = 1
    ERROR = 2
    INTERRUPTED = 130


def print_closing_line(summary: Mapping[str, Any]) -> None:
    """Print the result as the last line of standard output, on the first rank alone.

    It begins on a new line, whatever a reward or another process has written to standard output before.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    sys.stdout.flush()
    separator = "" if _begins_line(sys.stdout) else "\n"
    print(f"{separator}{json.dumps(summary)}", flush=True)


def _begins_line(stream: TextIO) -> bool:
    """Return whether a stream is a file at the beginning of a line: an empty one, or one that ends with a line feed."""
    try:
        descriptor = stream.fileno()
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return False
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:  # the descriptor is open for writing only
            return status.st_size == 0 or os.pread(file.fileno(), 1, status.st_size - 1) == b"\n"
    except (OSError, ValueError):
        return False


@contextmanager
def no_silent_exit() -> Iterator[None]:
    """Prevent code that is called within this context from ending the process with status 0.

    `os._exit` raises SystemExit in the main thread and in the threads of rewards and rollouts, whose errors reach the
    main thread: the run then saves its work and reports the call. In any other thread, such as a watchdog, it ends the
    process with a status other than 0. In child processes it is unchanged.
    """
    exit_now, process = os._exit, os.getpid()

    def ask_to_exit(status: int) -> NoReturn:
        if os.getpid() != process:
            exit_now(status)
        thread = threading.current_thread()
        if thread is threading.main_thread() or thread.name in OWN_THREADS:
            raise SystemExit(f"os._exit({status})")
        print(f"alignlab: os._exit({status}) was called in a thread, and ends the run", file=sys.stderr, flush=True)
        exit_now(status or ExitStatus.UNEXPECTED)

    os._exit = ask_to_exit
    try:
        yield
    finally:
        os._exit = exit_now
