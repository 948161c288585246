"""How a command ends: its exit status, and the closing line on standard output.

| status | of `alignlab train` |
|---|---|
| 0 | every step is done, and the model and the report are written; `learnt` in the closing line may still be false |
| 1 | an error without a name, with its traceback; or code that the run called, such as a reward, ended the process |
| 2 | a wrong command line, or an error that has a name: refused before work is lost, or stopped by it |
| 2 | not one update was made: the closing line says why in `reason`, and the saved weights are those of the start |
| 130 | stopped by SIGINT (Ctrl-C) or SIGTERM, or on another rank by it: `--resume` goes on |
| 128 + n | killed by signal n, as the shell tells it: `--resume` goes on from the last checkpoint |

Whatever the status, the last whole step is kept where it can be: see `alignlab/training/README.md`.
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
"""Names of the threads that hand their errors on to the main one."""


class ExitStatus(IntEnum):
    """Exit statuses of every command."""

    DONE = 0
    UNEXPECTED = 1
    ERROR = 2
    INTERRUPTED = 130


def print_closing_line(summary: Mapping[str, Any]) -> None:
    """Print the result as the last line of standard output, on the first rank alone.

    The line begins a line of its own, whatever code that the run called, or a process of it, has written before.
    """
    if int(os.environ.get("RANK", "0")) != 0:
        return
    sys.stdout.flush()
    separator = "" if _begins_line(sys.stdout) else "\n"
    print(f"{separator}{json.dumps(summary)}", flush=True)


def _begins_line(stream: TextIO) -> bool:
    """Whether a stream is known to be at the beginning of a line: a file that is empty or ends with a line feed."""
    try:
        descriptor = stream.fileno()
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            return False
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:  # what was opened to write cannot be read itself
            return status.st_size == 0 or os.pread(file.fileno(), 1, status.st_size - 1) == b"\n"
    except (OSError, ValueError):
        return False


@contextmanager
def no_silent_exit() -> Iterator[None]:
    """Keep code that is called within this context from ending the process as if all were well.

    `os._exit` becomes a `SystemExit` in the main thread and in those of rewards and rollouts, which hand their errors
    on: what was done is kept then, and told. In any other thread, as of a watchdog, it ends the process, with another
    status than 0. In child processes it is itself.
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
