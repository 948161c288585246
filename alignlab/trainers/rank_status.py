"""What the ranks of a run tell each other while they work, and which of them the others wait for in vain."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Literal

ProcessState = Literal["running", "stopped", "gone"]
STOPPED_LIMIT_S = 30.0
"""A rank that another on its machine sees stopped, as by SIGSTOP, and that says nothing for so long, is lost."""
UNSEEN_LIMIT_S = 120.0
"""A rank that says nothing for so long is lost where no other is on its machine to look after it."""
_LIBRARIES = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
_WAITING_FILES = ("/torch/distributed/", "/torch/autograd/graph.py")
"""Where a thread stands that waits for other ranks: collectives, and gradients that are summed over the ranks."""


@dataclass(frozen=True)
class RankStatus:
    """One rank as it describes itself.

    Attributes:
        beat: counts up; a rank that does not count is stopped, or gone.
        pid, host, started: its process; `host` names the machine and the space of process ids.
        block: number of the watched block of work that it is in, from 1.
        is_done: whether it has come to the end of that block, and nobody has to wait for it.
        step, phase: what it is doing, for messages.
        num_phases: phases begun in this block, in which all ranks go through the same phases.
        still_s: for how long its working thread has stood at the same place.
        is_waiting: whether that place is a wait for other ranks.
        place: file, line and function of it, as far inside as it is no library's.
        processes: of the ranks on its machine, by rank.
        failure: why it has ended, or is about to.
        failed_of: the rank whose loss made it end; None where the failure is its own.
        has_saved: whether it has saved what it could, and the others need not wait for that.
    """

    beat: int
    pid: int
    host: str
    started: str
    block: int
    is_done: bool
    step: int
    phase: str
    num_phases: int
    still_s: float
    is_waiting: bool
    place: str
    processes: Mapping[int, ProcessState] = field(default_factory=dict)
    failure: str | None = None
    failed_of: int | None = None
    has_saved: bool = False

    def to_json(self) -> str:
        """Return all of it as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> RankStatus:
        """Take back what `to_json` gave."""
        told = json.loads(text)
        return cls(**told | {"processes": {int(rank): state for rank, state in told["processes"].items()}})

    @property
    def work(self) -> str:
        """What it is doing."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase


@dataclass(frozen=True)
class LostRank:
    """A rank that the others cannot go on without.

    Attributes:
        rank: which.
        message: who it is, what it was doing, and what became of it.
        is_gone: whether its process has ended, which breaks the connections of the others.
    """

    rank: int
    message: str
    is_gone: bool = False


def find_lost(
    ranks: Mapping[int, RankStatus], silent_s: Mapping[int, float], *, own: int, timeout_s: float
) -> LostRank | None:
    """Return the rank that has failed, is gone or stopped, or keeps others waiting for too long; None if none has.

    Args:
        ranks: the last that each rank told, this one included.
        silent_s: for how long each has not counted on, by this rank's clock.
        own: this rank.
        timeout_s: how long ranks wait for one that is alive.
    """
    block = ranks[own].block
    needed = {
        rank: status
        for rank, status in ranks.items()
        if status.block < block or (status.block == block and not status.is_done)
    }
    for status in ranks.values():
        if status.failed_of is not None and status.failure is not None:  # found by another rank
            return LostRank(status.failed_of, status.failure)
    for find in (_failed, _gone_or_silent, _standing_still):
        lost = find(needed, ranks, silent_s, own, timeout_s)
        if lost is not None:
            message = f"rank {lost[0]} {_described(needed[lost[0]])} {lost[1]}"
            return LostRank(lost[0], message, is_gone=_state_of(lost[0], ranks) == "gone")
    return None


_Ranks = Mapping[int, RankStatus]
_Lost = tuple[int, str] | None


def _failed(needed: _Ranks, ranks: _Ranks, silent_s: Mapping[int, float], own: int, timeout_s: float) -> _Lost:
    """The first rank that says that it has failed in this block by itself."""
    for rank, status in needed.items():
        if rank != own and status.failure is not None and status.block == ranks[own].block:
            return rank, f"failed: {status.failure}"
    return None


def _gone_or_silent(
    needed: _Ranks, ranks: _Ranks, silent_s: Mapping[int, float], own: int, timeout_s: float
) -> _Lost:
    """A rank whose process is gone or stopped, or that nothing is heard of."""
    for rank in needed:
        if rank == own:
            continue
        state = _state_of(rank, ranks)
        if state == "gone":
            return rank, "has ended without a word: killed, or failed outside of the training; see its output and dmesg"
        limit = timeout_s if state == "running" else STOPPED_LIMIT_S if state == "stopped" else UNSEEN_LIMIT_S
        if silent_s.get(rank, 0.0) > min(limit, timeout_s):
            what = "is stopped, by SIGSTOP or a debugger" if state == "stopped" else "is stuck, or cannot be reached"
            return rank, f"{what}, and has said nothing for {silent_s[rank]:.0f} s"
    return None


def _state_of(rank: int, ranks: _Ranks) -> ProcessState | None:
    """What the ranks on its machine see of a rank's process; None where there is no other."""
    seen = [status.processes[rank] for other, status in ranks.items() if other != rank and rank in status.processes]
    return max(seen, key=("running", "stopped", "gone").index, default=None)


def _standing_still(
    needed: _Ranks, ranks: _Ranks, silent_s: Mapping[int, float], own: int, timeout_s: float
) -> _Lost:
    """The rank that others have waited for: of those that do not wait, the one that is furthest behind."""
    behind = min((_progress(status) for status in needed.values()), default=(0, 0))
    waiting = {
        rank: status
        for rank, status in needed.items()
        if status.still_s > timeout_s and (status.is_waiting or _progress(status) > behind)
    }
    if not waiting or len(needed) == 1:
        return None
    others = {rank: status for rank, status in needed.items() if rank not in waiting}
    rank = min(others or waiting, key=lambda each: (*_progress(needed[each]), each))
    status = needed[rank]
    if not others:
        what = f"waits, as all ranks do, for what none sends; it has stood at {status.place} for {status.still_s:.0f} s"
    elif status.still_s > timeout_s / 2:  # the others may have begun to wait before it came to stand
        what = f"does not get on; it has stood at {status.place} for {status.still_s:.0f} s"
    else:
        longest = max(each.still_s for each in waiting.values())
        what = f"has kept others waiting for {longest:.0f} s, and is at work at {status.place}"
    return rank, f"{what} (trainer.rank_timeout_s is {timeout_s:g})"


def _progress(status: RankStatus) -> tuple[int, int]:
    return status.block, status.num_phases


def _described(status: RankStatus) -> str:
    return f"(process {status.pid} on {status.host.partition('/')[0]}; {status.work})"


class WorkingThread:
    """Where a thread stands, and for how long."""

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self._stack: tuple[tuple[int, int], ...] = ()
        self._since = time.monotonic()
        self.place, self.is_waiting = "nowhere", False

    def look(self) -> float:
        """Look where it stands now; return for how many seconds it has been seen there."""
        frame = sys._current_frames().get(self.ident)
        stack = tuple((id(each.f_code), each.f_lasti) for each in _outwards(frame))
        if stack != self._stack:
            self._stack, self._since = stack, time.monotonic()
        if frame is not None:
            self.is_waiting = any(part in frame.f_code.co_filename for part in _WAITING_FILES)
            shown = next(filter(_is_told, _outwards(frame)), frame)
            self.place = f"{shown.f_code.co_filename}:{shown.f_lineno} ({shown.f_code.co_name})"
        return time.monotonic() - self._since


def _outwards(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _is_told(frame: FrameType) -> bool:
    """Whether a place says more to a reader than one inside a library."""
    file = frame.f_code.co_filename
    return "/alignlab/" in file or not file.startswith(_LIBRARIES)


def this_host() -> str:
    """Return what names this machine and its space of process ids."""
    parts = [os.uname().nodename]
    if Path("/proc/self/ns/pid").is_symlink():  # Linux
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(parts)


def start_of(pid: int) -> str:
    """Return when a process has started, in the kernel's units: another process of its number began later."""
    try:
        return _fields(pid)[19]
    except OSError:
        return ""


def state_of(pid: int, started: str) -> ProcessState:
    """Return what has become of a process on this machine."""
    try:
        fields = _fields(pid)
    except OSError:
        return "gone" if Path("/proc/self/stat").exists() else _state_without_proc(pid)
    if fields[0] in "ZXx" or fields[19] != started:
        return "gone"
    return "stopped" if fields[0] in "Tt" else "running"


def _fields(pid: int) -> list[str]:
    """The fields of a process's status behind its name, which may hold anything."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _state_without_proc(pid: int) -> ProcessState:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    return "running"
