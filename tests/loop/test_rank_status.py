"""Choice of the lost rank from the statuses of all ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from dataclasses import replace
from typing import Any

import pytest

from alignlab.loop.rank_status import (
    STOPPED_LIMIT_S,
    UNSEEN_LIMIT_S,
    RankStatus,
    WorkingThread,
    find_lost,
    start_of,
    state_of,
    this_host,
)

TIMEOUT_S = 600.0
LATE = TIMEOUT_S + 1


def status(rank: int, **changes: Any) -> RankStatus:
    usual: dict[str, Any] = {
        "beat": 7, "pid": 100 + rank, "host": "a/b/c", "started": "1", "block": 1, "is_done": False, "step": 4,
        "phase": "generate", "num_phases": 9, "still_s": 1.0, "is_waiting": False, "place": f"file_{rank}.py:3 (f)",
        "processes": {other: "running" for other in range(3) if other != rank},
    }
    return RankStatus(**usual | changes)


def lost(changes: dict[int, dict[str, Any]], silent: dict[int, float] | None = None, this_rank: int = 0) -> Any:
    ranks = {rank: status(rank, **changes.get(rank, {})) for rank in range(3)}
    return find_lost(ranks, dict.fromkeys(range(3), 1.0) | (silent or {}), this_rank=this_rank, timeout_s=TIMEOUT_S)


def sees(state: str) -> dict[str, Any]:
    """Fields of a rank that sees the process of rank 2 in this state."""
    return {"processes": {2: state}}


WAITS = {"is_waiting": True, "still_s": LATE}


@pytest.mark.parametrize(
    ("changes", "silent", "message"),
    [
        ({2: {"failure": "Error: no"}}, {}, r"rank 2 \(process 102 on a; step 4, generate\) failed: Error: no"),
        ({1: sees("gone")}, {}, "has ended without a word"),
        ({1: sees("stopped")}, {2: STOPPED_LIMIT_S + 1}, "is stopped, by SIGSTOP or a debugger, and has said nothing"),
        ({}, {2: LATE}, "is stuck, or cannot be reached"),
        ({0: {"processes": {}}, 1: {"processes": {}}}, {2: UNSEEN_LIMIT_S + 1}, "is stuck, or cannot be reached"),
        ({0: WAITS, 1: WAITS}, {}, r"kept others waiting for 601 s, and is at work at file_2.py:3 .*timeout_s is 600"),
        ({0: WAITS, 1: WAITS, 2: {"still_s": 0.6 * TIMEOUT_S}}, {}, "does not get on; .* for 360 s"),
        ({0: WAITS, 1: WAITS, 2: {"still_s": LATE}}, {}, "does not get on; .* stood at file_2.py:3 .f. for 601 s"),
        ({0: {"still_s": LATE, "num_phases": 10}, 1: {"num_phases": 10}, 2: {"still_s": LATE}}, {}, "does not get on"),
        ({0: {"block": 2}, 2: {"is_done": True}, 1: sees("gone")}, {}, "has ended without a word"),
    ],
)
def test_lost_rank_is_named_with_the_reason(changes: Any, silent: Any, message: str) -> None:
    lost_rank = lost(changes, silent)
    assert lost_rank.rank == 2 and re.search(message, lost_rank.message), lost_rank.message
    assert lost_rank.is_gone == ("gone" in str(changes))


@pytest.mark.parametrize(
    ("changes", "silent"),
    [
        ({}, {}),
        ({1: sees("stopped")}, {2: STOPPED_LIMIT_S - 1}),
        ({}, {2: TIMEOUT_S - 1}),
        ({1: sees("gone"), 2: {"is_done": True}}, {}),
        ({1: sees("gone"), 2: {"block": 2}}, {}),
        ({0: {"block": 2}, 1: {"block": 2}, 2: {"failure": "the same as of all"}}, {}),
        ({rank: {"still_s": LATE} for rank in range(3)}, {}),
        ({0: {"is_waiting": True, "still_s": TIMEOUT_S - 1}, 2: {"still_s": LATE}}, {}),
    ],
    ids=[
        "all well", "stopped for a moment", "silent and running", "ended after its work", "ahead",
        "failed before, as all did", "all in a long native call", "waited for within the limit",
    ],
)
def test_no_rank_is_lost_within_the_limits(changes: Any, silent: Any) -> None:
    assert lost(changes, silent) is None


def test_rank_0_is_lost_where_all_ranks_wait_for_each_other() -> None:
    lost_rank = lost(dict.fromkeys(range(3), WAITS))
    assert lost_rank.rank == 0 and "waits, as all ranks do, for a message that none sends" in lost_rank.message


def test_loss_reported_by_another_rank_is_adopted_also_by_the_lost_rank_itself() -> None:
    ended = {0: {"failure": "rank 2 (...) is stopped", "failed_of": 2}}
    for this_rank in (1, 2):
        lost_rank = lost(ended, this_rank=this_rank)
        assert (lost_rank.rank, lost_rank.message) == (2, "rank 2 (...) is stopped")


def test_status_survives_a_round_trip_through_json() -> None:
    before = replace(status(1), failure="x", failed_of=2, has_saved=True)
    assert RankStatus.from_json(before.to_json().encode()) == before


def test_process_state_is_running_then_stopped_then_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = start_of(child.pid)
    assert state_of(child.pid, started) == "running" and state_of(child.pid, "another") == "gone"
    os.kill(child.pid, 19)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED)
    assert state_of(child.pid, started) == "stopped"
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert state_of(child.pid, started) == "gone", "a zombie"
    child.communicate()
    assert state_of(child.pid, started) == "gone"
    assert this_host() == this_host() != ""


def test_place_and_standing_time_of_a_thread_that_stands_still() -> None:
    go, gone = threading.Event(), threading.Event()

    def wait_here() -> None:
        go.wait()
        gone.set()
        release.wait()

    release = threading.Event()
    thread = threading.Thread(target=wait_here)
    thread.start()
    watched = WorkingThread(thread.ident or 0)
    first = watched.look()
    assert watched.look() >= first and "(wait_here)" in watched.place and not watched.is_waiting
    before = watched._since
    go.set()
    gone.wait(10)
    watched.look()
    assert watched._since > before
    release.set()
    thread.join()
