"""Status of each rank of a run, and the choice of the rank that the others wait for in vain."""

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
"""A stopped process (SIGSTOP, debugger), as seen by another rank on its machine, is lost after this silence."""
UNSEEN_LIMIT_S = 120.0
"""A rank without another rank on its machine, which could look at its process, is lost after this silence."""
_LIBRARIES = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib"))
_WAITING_FILES = ("/torch/distributed/", "/torch/autograd/graph.py")
"""Files in which a thread waits for other ranks: collectives, and gradients that are summed over the ranks."""


@dataclass(frozen=True)
class RankStatus:
    """Status of one rank, as this rank reports it.

    Attributes:
        beat: counts up; it stands still where the rank is stopped or gone.
        pid, host, started: the rank's process; `host` names the machine and the space of process ids.
        block: number of the watched block of work that the rank is in, from 1.
        is_done: whether the rank has come to the end of that block, so that nobody has to wait for it.
        step, phase: current work, for messages.
        num_phases: phases begun in this block; all ranks go through the same phases.
        still_s: seconds for which the working thread has stood at the same place.
        is_waiting: whether that place is a wait for other ranks.
        place: file, line and function of that place: the innermost frame outside of libraries.
        processes: states of the other ranks' processes on the same machine, by rank.
        failure: reason why the rank has ended, or is about to.
        failed_of: the lost rank that made this rank end; None where the failure is its own.
        has_saved: whether the rank has saved what it could, so that the others need not wait for that.
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
        """Return all fields as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> RankStatus:
        """Read the output of `to_json`."""
        fields = json.loads(text)
        return cls(**fields | {"processes": {int(rank): state for rank, state in fields["processes"].items()}})

    @property
    def work(self) -> str:
        """Current step and phase, in words."""
        return f"step {self.step}, {self.phase}" if self.step else self.phase

    @property
    def progress(self) -> tuple[int, int]:
        """Block and number of phases: comparable between ranks, which all do the same work."""
        return self.block, self.num_phases


@dataclass(frozen=True)
class LostRank:
    """A rank that the others cannot go on without.

    Attributes:
        rank: its number.
        message: its process, its last work, and what became of it.
        is_gone: whether its process has ended, which breaks the connections of the others.
    """

    rank: int
    message: str
    is_gone: bool = False


def find_lost(
    ranks: Mapping[int, RankStatus], silent_s: Mapping[int, float], *, this_rank: int, timeout_s: float
) -> LostRank | None:
    """Return the rank that has failed, is gone or stopped, or keeps others waiting for too long; None if none has.

    Args:
        ranks: the last status of each rank, this one included.
        silent_s: seconds since the beat of each rank last changed, by this rank's clock.
        this_rank: number of the calling rank.
        timeout_s: limit on the wait for a rank that is alive.
    """
    for status in ranks.values():
        if status.failed_of is not None and status.failure is not None:  # another rank was the first to see the loss
            return LostRank(status.failed_of, status.failure)
    view = _View(ranks, silent_s, this_rank, timeout_s)
    loss = view.failed() or view.gone_or_silent() or view.standing_still()
    if loss is None:
        return None
    rank, reason = loss
    message = f"rank {rank} {_described(ranks[rank])} {reason}"
    return LostRank(rank, message, is_gone=view.process_state(rank) == "gone")


_Loss = tuple[int, str]
"""Number of a lost rank, and the reason."""


class _View:
    """The ranks as the calling rank sees them; arguments as in `find_lost`.

    Attributes:
        needed: ranks that have not got through this rank's block, so that this rank has to wait for them.
    """

    def __init__(
        self, ranks: Mapping[int, RankStatus], silent_s: Mapping[int, float], this_rank: int, timeout_s: float
    ) -> None:
        self.ranks, self.silent_s, self.this_rank, self.timeout_s = ranks, silent_s, this_rank, timeout_s
        self.block = ranks[this_rank].block
        self.needed = {
            rank: status
            for rank, status in ranks.items()
            if status.block < self.block or (status.block == self.block and not status.is_done)
        }

    def failed(self) -> _Loss | None:
        """Return the first other rank that reports a failure of its own in this block."""
        for rank, status in self.needed.items():
            if rank != self.this_rank and status.failure is not None and status.block == self.block:
                return rank, f"failed: {status.failure}"
        return None

    def gone_or_silent(self) -> _Loss | None:
        """Return the first other rank whose process is gone or stopped, or that has been silent for too long."""
        for rank in self.needed:
            reason = None if rank == self.this_rank else self._reason_of_silence(rank)
            if reason is not None:
                return rank, reason
        return None

    def _reason_of_silence(self, rank: int) -> str | None:
        state = self.process_state(rank)
        if state == "gone":
            return "has ended without a word: killed, or failed outside of the training; see its output and dmesg"
        limits = {"running": self.timeout_s, "stopped": STOPPED_LIMIT_S, None: UNSEEN_LIMIT_S}
        silent_s = self.silent_s.get(rank, 0.0)
        if silent_s <= min(limits[state], self.timeout_s):
            return None
        cause = "is stopped, by SIGSTOP or a debugger" if state == "stopped" else "is stuck, or cannot be reached"
        return f"{cause}, and has said nothing for {silent_s:.0f} s"

    def process_state(self, rank: int) -> ProcessState | None:
        """Return the worst state that other ranks on its machine see of a rank's process; None without such ranks."""
        states = [
            status.processes[rank]
            for observer, status in self.ranks.items()
            if observer != rank and rank in status.processes
        ]
        return max(states, key=("running", "stopped", "gone").index, default=None)

    def standing_still(self) -> _Loss | None:
        """Return the rank that keeps others waiting: of those that do not wait, the one with the least progress."""
        least = min((status.progress for status in self.needed.values()), default=(0, 0))
        waiting = {
            rank: status
            for rank, status in self.needed.items()
            if status.still_s > self.timeout_s and (status.is_waiting or status.progress > least)
        }
        if not waiting or len(self.needed) == 1:
            return None
        at_work = {rank: status for rank, status in self.needed.items() if rank not in waiting}
        rank, status = min((at_work or waiting).items(), key=lambda item: (item[1].progress, item[0]))
        longest_wait_s = max(waiter.still_s for waiter in waiting.values())
        reason = self._reason_of_wait(status, longest_wait_s, all_wait=not at_work)
        return rank, f"{reason} (trainer.rank_timeout_s is {self.timeout_s:g})"

    def _reason_of_wait(self, status: RankStatus, longest_wait_s: float, *, all_wait: bool) -> str:
        stood = f"has stood at {status.place} for {status.still_s:.0f} s"
        if all_wait:
            return f"waits, as all ranks do, for a message that none sends; it {stood}"
        # Half the limit: the others may have begun to wait before this rank came to stand.
        if status.still_s > self.timeout_s / 2:
            return f"does not get on; it {stood}"
        return f"has kept others waiting for {longest_wait_s:.0f} s, and is at work at {status.place}"


def _described(status: RankStatus) -> str:
    return f"(process {status.pid} on {status.host.partition('/')[0]}; {status.work})"


class WorkingThread:
    """The place where a thread stands, and since when.

    Args:
        ident: of the thread, as `threading.get_ident` returns it.

    Attributes:
        place: file, line and function, as of the last `look`.
        is_waiting: whether the thread waited for other ranks then.
    """

    def __init__(self, ident: int) -> None:
        self.ident = ident
        self._stack: tuple[tuple[int, int], ...] = ()
        self._since = time.monotonic()
        self.place, self.is_waiting = "nowhere", False

    def look(self) -> float:
        """Look where the thread stands now; return for how many seconds it has been seen there."""
        innermost = sys._current_frames().get(self.ident)
        frames = _outwards(innermost)
        stack = tuple((id(frame.f_code), frame.f_lasti) for frame in frames)
        if stack != self._stack:
            self._stack, self._since = stack, time.monotonic()
        if innermost is not None:
            self.is_waiting = any(file in innermost.f_code.co_filename for file in _WAITING_FILES)
            frame = next(filter(_is_outside_libraries, frames), innermost)
            self.place = f"{frame.f_code.co_filename}:{frame.f_lineno} ({frame.f_code.co_name})"
        return time.monotonic() - self._since


def _outwards(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return frames


def _is_outside_libraries(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    return "/alignlab/" in file or not file.startswith(_LIBRARIES)


def this_host() -> str:
    """Return a name of this machine and its space of process ids."""
    names = [os.uname().nodename]
    if Path("/proc/self/ns/pid").is_symlink():  # Linux
        names += [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return "/".join(names)


def start_of(pid: int) -> str:
    """Return the start time of a process, in the kernel's units; it tells the process from a later one of its id."""
    try:
        return _fields(pid)[19]
    except OSError:
        return ""


def state_of(pid: int, started: str) -> ProcessState:
    """Return the state of a process on this machine."""
    try:
        fields = _fields(pid)
    except OSError:
        return "gone" if Path("/proc/self/stat").exists() else _state_without_proc(pid)
    if fields[0] in "ZXx" or fields[19] != started:
        return "gone"
    return "stopped" if fields[0] in "Tt" else "running"


def _fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat after the process's name, which may hold spaces and brackets."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _state_without_proc(pid: int) -> ProcessState:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    return "running"
