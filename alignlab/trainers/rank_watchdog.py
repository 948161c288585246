"""A watch over the ranks of a run: one that fails, is killed, is stopped or hangs is named, and the others end in time.

Each rank tells the others what it is doing (`rank_status`), through the store that torch.distributed has connected them
by. Two threads a rank: one talks to the store, which may keep it waiting; the other decides and ends. A thread that
waits in a collective of gloo cannot be woken: where it does not come back by itself, the process is ended under it,
after the last whole step has been saved.
"""

from __future__ import annotations

import atexit
import logging
import os
import posix
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.distributed import PrefixStore
from torch.distributed.distributed_c10d import _get_default_store

from alignlab.errors import RankError
from alignlab.trainers.rank_status import (
    LostRank,
    ProcessState,
    RankStatus,
    WorkingThread,
    find_lost,
    start_of,
    state_of,
    this_host,
)

logger = logging.getLogger(__name__)

BEAT_S = 2.0
GRACE_S = 10.0
"""For the working thread to come back by itself, once a rank is lost."""
END_LIMIT_S = 50.0
"""From the loss of a rank to the end of the process; a checkpoint that is being written is waited for."""
EXIT_STATUS = 2
_PREFIX = "alignlab-ranks"
_STORE_LIMIT_S = 15.0
_MEETING_S, _MEETING_LOOK_S = 60.0, 0.05
_SHOWN_FRAMES = 12
_MAX_ERROR_CHARS = 1000
_BROKEN = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


@dataclass(frozen=True)
class Position:
    """What a rank is doing.

    Attributes:
        step: under way, from 1; 0 before the first.
        phase: of the step, or what else is done.
        num_phases: begun so far.
    """

    step: int = 0
    phase: str = "set-up"
    num_phases: int = 0


class RankWatchdog:
    """Watches all ranks, from each of them, in blocks of work that all ranks go through.

    Args:
        store: shared by the ranks, for this watch alone.
        rank, num_ranks: of this process.
        timeout_s: how long ranks wait for one that is alive and does not get on.
    """

    def __init__(self, store: Any, rank: int, num_ranks: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.lost: LostRank | None = None
        self._store, self._rank, self._others = store, rank, [each for each in range(num_ranks) if each != rank]
        self._beat_s = min(BEAT_S, timeout_s / 4)
        self._position: Callable[[], Position] = Position
        self._keep: Callable[[], object] = lambda: None
        self._depth = 0
        self._thread = WorkingThread(threading.get_ident())
        self._own = RankStatus(
            beat=0, pid=os.getpid(), host=this_host(), started=start_of(os.getpid()), block=0, is_done=True, step=0,
            phase="", num_phases=0, still_s=0.0, is_waiting=False, place="",
        )
        self._ranks: dict[int, RankStatus] = {}
        self._heard: dict[int, float] = {}
        self._store_answered = time.monotonic()
        self._started = time.monotonic()
        self._lock = threading.RLock()
        self._wanted, self._told, self._is_known = threading.Event(), threading.Event(), threading.Event()
        self._is_unwinding, self._is_over, self._are_all_known = (threading.Event() for _ in range(3))
        self._talker = threading.Thread(target=self._talk, name="alignlab-ranks-talk", daemon=True)
        self._talker.start()
        threading.Thread(target=self._watch, name="alignlab-ranks-watch", daemon=True).start()
        atexit.register(self._stop)  # a thread inside the store's native code must not be met by the interpreter's end
        self._are_all_known.wait(min(timeout_s, _MEETING_S))

    def begin(self) -> None:
        """Begin a block of work, unless one is under way already; the calling thread is the one that works."""
        with self._lock:
            if self._own.is_done or (self._own.failure is not None and not self._depth):
                self._thread = WorkingThread(threading.get_ident())
                block = self._own.block + 1
                self._own = replace(self._own, block=block, is_done=False, failure=None, has_saved=False)
        self._wanted.set()

    @contextmanager
    def watched(self, position: Callable[[], Position], keep: Callable[[], object]) -> Iterator[None]:
        """Do the rest of a block of work, which ends with this context, or with the one that it is within.

        Args:
            position: says what is done, from any thread.
            keep: saves what would be lost, without waiting for another rank, and returns once it is saved; called from
                any thread, once the working thread is stuck.

        Raises:
            RankError: another rank is lost. The process is ended within `END_LIMIT_S`, whatever catches it.
        """
        self.begin()
        outer = self._position, self._keep
        self._position, self._keep = position, keep
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if threading.current_thread() is threading.main_thread():
                # A launcher that sees one rank end sends this to the others, and would cut short what they say.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            lost = self._cause_of(error)
            if lost is None:
                self._fail(f"{type(error).__name__}: {error}"[:_MAX_ERROR_CHARS], None)
            self._finish_saving(time.monotonic() + END_LIMIT_S)
            if lost is None:
                raise
            raise RankError(_with_fix(lost)) from None
        else:
            if self._depth == 1:
                self._tell(is_done=True)
        finally:
            self._depth -= 1
            self._position, self._keep = outer

    def _cause_of(self, error: BaseException) -> LostRank | None:
        """The loss of another rank that an error comes from; None where it is this rank's own."""
        if not _is_broken_connection(error):
            return None
        self._wanted.set()
        if self._is_known.wait(GRACE_S):
            self._is_unwinding.set()
            return self.lost
        brief = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return LostRank(-1, f"the connection to another rank broke ({brief[:300]}), and no rank has said why")

    def _finish_saving(self, deadline: float) -> None:
        """Save what would be lost, on rank 0; wait for that on the others: a launcher ends all ranks after the first.
        """
        if self._rank == 0:
            try:
                self._keep()
            except Exception:  # the process ends all the same, and the reason why has been said
                traceback.print_exc()
            self._tell(has_saved=True)
            if not _launcher_holds_store():
                time.sleep(3 * self._beat_s)  # let the others hear before the store ends with this process
        while self._rank != 0 and time.monotonic() < deadline and not self._main_rank_is_over():
            time.sleep(self._beat_s / 2)

    def _main_rank_is_over(self) -> bool:
        main = self._ranks.get(0)
        if main is None or main.has_saved or main.block > self._own.block:  # it may have begun another block since
            return True
        return self._processes().get(0, "running") != "running"

    def _fail(self, text: str, of: int | None) -> None:
        if self._own.failure is None:
            self._tell(failure=text, failed_of=of)

    def _tell(self, **changes: Any) -> None:
        """Let the others know now, if the store answers."""
        with self._lock:
            self._own = replace(self._own, **changes)
        if self._is_over.is_set():
            return
        self._told.clear()
        self._wanted.set()
        self._told.wait(2 * self._beat_s)

    def tell_soon(self) -> None:
        """Let the others know without waiting for it."""
        self._wanted.set()

    def _stop(self) -> None:
        self._is_over.set()
        self._wanted.set()
        self._talker.join(self._beat_s)

    def _talk(self) -> None:
        """Tell and hear, as long as there is a block of work."""
        while not self._is_over.is_set():
            own = self._own
            try:
                self._exchange()
            except RuntimeError as error:  # its process is gone
                logger.debug("the ranks' store does not answer: %s", error)
                self._is_over.set()
            if len(self._ranks) == len(self._others):
                self._are_all_known.set()
            self._told.set()
            all_known = self._are_all_known.is_set()
            self._wanted.wait(_MEETING_LOOK_S if not all_known else None if own.is_done else self._beat_s)
            self._wanted.clear()
        self._told.set()

    def _exchange(self) -> None:
        position, still_s = self._position(), self._thread.look()
        # Looked at before the others are heard: what one has said before its end is heard then.
        processes = self._processes()
        with self._lock:
            self._own = own = replace(
                self._own, beat=self._own.beat + 1, step=position.step, phase=position.phase,
                num_phases=position.num_phases, still_s=still_s, is_waiting=self._thread.is_waiting,
                place=self._thread.place, processes=processes,
            )
        self._store.set(str(self._rank), own.to_json())
        for rank in self._others:
            if rank in self._ranks or self._store.check([str(rank)]):
                self._hear(rank, RankStatus.from_json(self._store.get(str(rank))))
        self._store_answered = time.monotonic()

    def _hear(self, rank: int, status: RankStatus) -> None:
        known = self._ranks.get(rank)
        if known is None or known.beat != status.beat:
            self._heard[rank] = time.monotonic()
        with self._lock:
            self._ranks = self._ranks | {rank: status}

    def _watch(self) -> None:
        """Look for a lost rank until there is one, and end then."""
        looked = time.monotonic()
        while self.lost is None:
            time.sleep(self._beat_s / 2)
            now = time.monotonic()
            if now - looked > 3 * self._beat_s:  # this process was stopped itself: hear the others first
                self._heard = dict.fromkeys(self._heard, now)
                self._store_answered = now
            looked = now
            lost = self._look(now)
            if lost is not None and lost.is_gone:
                self._tell()  # hear what it has said last
                lost = self._look(now)
            self.lost = lost
        self._end(self.lost)

    def _look(self, now: float) -> LostRank | None:
        with self._lock:
            own, ranks = self._own, dict(self._ranks)
        if own.is_done or own.failure is not None:
            return None
        for rank in self._others:
            if rank not in ranks and now - self._started > self.timeout_s:
                return LostRank(rank, f"rank {rank} has said nothing since the start, {now - self._started:.0f} s ago")
        if now - self._store_answered > min(self.timeout_s, _STORE_LIMIT_S):
            own = replace(own, processes=self._processes())
            self._hear_without_store(own.processes, now)
        silences = {rank: now - heard for rank, heard in self._heard.items()}
        return find_lost(ranks | {self._rank: own}, silences, own=self._rank, timeout_s=self.timeout_s)

    def _hear_without_store(self, processes: Mapping[int, ProcessState], now: float) -> None:
        """Take ranks for well of which nothing can be heard: all but those seen stopped, and the one that holds the
        store and is on another machine."""
        for rank in self._others:
            holds_store = rank == 0 and not _launcher_holds_store()
            if processes.get(rank) == "running" or (rank not in processes and not holds_store):
                self._heard[rank] = now

    def _processes(self) -> dict[int, ProcessState]:
        """What has become of the other ranks on this machine."""
        here = {rank: status for rank, status in self._ranks.items() if status.host == self._own.host}
        return {rank: state_of(status.pid, status.started) for rank, status in here.items()}

    def _end(self, lost: LostRank) -> None:
        """End this process in time: by its working thread, if that comes back, or under it."""
        deadline = time.monotonic() + END_LIMIT_S
        self._is_known.set()
        self._fail(lost.message, lost.rank)
        if lost.is_gone:  # the connections to it break, which wakes the working thread
            self._is_unwinding.wait(GRACE_S)
        if not self._is_unwinding.is_set():
            self._say(lost)
            self._finish_saving(deadline)
            if not lost.is_gone or not self._is_unwinding.wait(self._beat_s):
                self._exit()
        time.sleep(max(deadline - time.monotonic(), 0.0))
        self._exit()

    def _say(self, lost: LostRank) -> None:
        frame = sys._current_frames().get(self._thread.ident)
        if lost.rank == self._rank and frame is not None:
            print("".join(traceback.format_stack(frame)[-_SHOWN_FRAMES:]), file=sys.stderr)
        print(f"alignlab: rank {self._rank} ends: {_with_fix(lost)}", file=sys.stderr, flush=True)

    def _exit(self) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        posix._exit(EXIT_STATUS)  # os._exit may be replaced while rewards run


_watchdog: RankWatchdog | None = None


def watch_ranks(rank: int, num_ranks: int, timeout_s: float) -> None:
    """Watch the ranks of this process group from now on; the block of work that begins here ends with `watched`."""
    global _watchdog
    if num_ranks == 1 or not torch.distributed.is_initialized():
        return
    if _watchdog is None:
        default: Any = _get_default_store()
        _watchdog = RankWatchdog(PrefixStore(_PREFIX, default.clone()), rank, num_ranks, timeout_s)
    _watchdog.timeout_s = timeout_s
    _watchdog.begin()


def tell_position() -> None:
    """Let the other ranks know soon what this one is doing now."""
    if _watchdog is not None:
        _watchdog.tell_soon()


@contextmanager
def watched(position: Callable[[], Position], keep: Callable[[], object]) -> Iterator[None]:
    """Do what all ranks do together; see `RankWatchdog.watched`. One rank alone is not watched."""
    if _watchdog is None:
        yield
        return
    with _watchdog.watched(position, keep):
        yield


@contextmanager
def watched_set_up() -> Iterator[None]:
    """Make what a run needs, `watch_ranks` being called on the way.

    Raises:
        RankError: another rank is lost; see `RankWatchdog.watched`.
    """
    try:
        yield
    except BaseException:
        with watched(Position, lambda: None):
            raise


def _launcher_holds_store() -> bool:
    """Whether the ranks' store is torchrun's, and not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _with_fix(lost: LostRank) -> str:
    return f"{lost.message}; correct what ended it, and go on by --resume"


def _is_broken_connection(error: BaseException) -> bool:
    """Whether an error comes from another rank that no longer answers."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(mark in text for mark in _BROKEN)
