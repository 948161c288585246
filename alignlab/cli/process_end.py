"""The end of the command's process, in spite of threads that hang.

At its end Python waits for every thread that is no daemon, such as those of a reward's thread pool. One that hangs in a
call would keep the process of a finished run, and its GPUs, for ever.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
from types import FrameType

GRACE_S = 30.0
_LOOK_S = 0.2
_LIBRARIES = (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"))


def end_despite_threads(status: int, grace_s: float = GRACE_S) -> int:
    """Return the status; if threads hang after the end of the main thread, report them and end the process.

    Args:
        status: exit status.
        grace_s: time that threads have after the end of the main thread.
    """
    threading.Thread(target=_end_later, args=(status, grace_s), name="alignlab-end", daemon=True).start()
    return status


def _end_later(status: int, grace_s: float) -> None:
    while not _is_main_thread_over():
        time.sleep(_LOOK_S)
    deadline = time.monotonic() + grace_s
    threads = _hanging()
    for thread in threads:
        thread.join(max(deadline - time.monotonic(), 0.0))
    hanging = [thread for thread in threads if thread.is_alive()]
    if not hanging:
        return
    named = "; ".join(f"{thread.name!r} at {_place(thread)}" for thread in hanging)
    print(
        f"alignlab: the command has ended, and after {grace_s:g} s threads of code that it called still run: {named}; "
        "the process is ended without them",
        file=sys.stderr, flush=True,
    )
    sys.stdout.flush()
    os._exit(status)


def _is_main_thread_over() -> bool:
    """Return whether the main thread is in Python's shutdown, where it waits for the other threads."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if frame.f_code.co_name == "_shutdown" and frame.f_code.co_filename == threading.__file__:
            return True
        frame = frame.f_back
    return False


def _hanging() -> list[threading.Thread]:
    """Return the threads that Python waits for."""
    return [thread for thread in threading.enumerate() if not thread.daemon and thread is not threading.main_thread()]


def _place(thread: threading.Thread) -> str:
    """Return file, line and function of a thread's innermost frame outside Python's own library."""
    innermost = frame = sys._current_frames().get(thread.ident or 0)
    while frame is not None and frame.f_code.co_filename.startswith(_LIBRARIES) and frame.f_back is not None:
        frame = frame.f_back
    shown: FrameType | None = frame if frame and not frame.f_code.co_filename.startswith(_LIBRARIES) else innermost
    return "its end" if shown is None else f"{shown.f_code.co_filename}:{shown.f_lineno} ({shown.f_code.co_name})"
