"""One of two ranks that are watched, without a training. Usage: rank_watched.py FOLDER RANK HOW WHERE TIMEOUT_S"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import torch

from alignlab.errors import AlignlabError
from alignlab.loop import rank_watchdog
from alignlab.loop.rank_watchdog import Position, tell_position, watch_ranks, watched, watched_set_up


def fail(how: str) -> None:
    """Report this rank's status, then fail: a short step may be over before the next beat."""
    assert rank_watchdog._watchdog is not None
    rank_watchdog._watchdog._tell()
    if how == "raise":
        raise AlignlabError("broken on purpose")
    if how == "hang":
        threading.Event().wait()
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])


def main() -> None:
    folder, failing, how, where, timeout_s = sys.argv[1:]
    rank_watchdog.BEAT_S, rank_watchdog.GRACE_S = 0.2, 5.0
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    phase = where
    try:
        if where == "set-up":
            with watched_set_up():
                watch_ranks(rank, 2, float(timeout_s))
                torch.distributed.barrier()
                if str(rank) == failing:
                    fail(how)
                torch.distributed.barrier()
        watch_ranks(rank, 2, float(timeout_s))
        with watched(lambda: Position(3, phase, 1), lambda: Path(folder, f"saved by {rank}").touch()):
            tell_position()
            torch.distributed.barrier()
            if str(rank) == failing:
                fail(how)
            torch.distributed.barrier()
    except AlignlabError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
