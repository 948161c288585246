"""A watch over the ranks of a run: a rank that fails, is killed, stopped or hangs is named, and the others end in time.

Each rank reports its status (`rank_status`) to the others through torch.distributed's store. Two threads a rank: one
talks to the store, which may keep that thread waiting; the other decides whether a rank is lost, and ends the process.
A thread that waits in a collective of gloo cannot be woken: where it does not come back by itself, the process is ended
under it, after the last completed step has been saved.
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
from alignlab.loop.rank_status import (
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
"""Time for the working thread to come back by itself, once a rank is lost."""
END_LIMIT_S = 50.0
"""Limit from the loss of a rank to the end of the process, in which a checkpoint may still be written."""
EXIT_STATUS = 2
_PREFIX = "alignlab-ranks"
_STORE_LIMIT_S = 15.0
_MEETING_S, _MEETING_LOOK_S = 60.0, 0.05
_SHOWN_FRAMES = 12
_MAX_ERROR_CHARS = 1000
_BROKEN = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")


@dataclass(frozen=True)
class Position:
    """Current work of a rank.

    Attributes:
        step: step under way, from 1; 0 before the first.
        phase: name of the phase of the step, or of other work.
        num_phases: phases begun so far.
    """

    step: int = 0
    phase: str = "set-up"
    num_phases: int = 0


class RankWatchdog:
    """Watches all ranks, from each of them, in blocks of work that all ranks go through.

    Args:
        store: torch.distributed store that the ranks share, for this watch alone.
        rank, num_ranks: of this process.
        timeout_s: limit on the wait for a rank that is alive and makes no progress.
    """

    def __init__(self, store: Any, rank: int, num_ranks: int, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.lost: LostRank | None = None
        self._store, self._rank = store, rank
        self._others = [other_rank for other_rank in range(num_ranks) if other_rank != rank]
        self._beat_s = min(BEAT_S, timeout_s / 4)
        self._position: Callable[[], Position] = Position
        self._keep: Callable[[], object] = lambda: None
        self._depth = 0
        self._thread = WorkingThread(threading.get_ident())
        self._status = RankStatus(
            beat=0, pid=os.getpid(), host=this_host(), started=start_of(os.getpid()), block=0, is_done=True, step=0,
            phase="", num_phases=0, still_s=0.0, is_waiting=False, place="",
        )
        self._ranks: dict[int, RankStatus] = {}
        self._heard_at: dict[int, float] = {}
        self._store_answered = time.monotonic()
        self._started = time.monotonic()
        self._lock = threading.RLock()
        self._exchange_now, self._exchanged, self._is_loss_known = (threading.Event() for _ in range(3))
        self._is_unwinding, self._is_over, self._are_all_known = (threading.Event() for _ in range(3))
        self._talker = threading.Thread(target=self._talk, name="alignlab-ranks-talk", daemon=True)
        self._talker.start()
        threading.Thread(target=self._watch, name="alignlab-ranks-watch", daemon=True).start()
        atexit.register(self._stop)  # the interpreter must not end while a thread is in the store's native code
        self._are_all_known.wait(min(timeout_s, _MEETING_S))

    def begin(self) -> None:
        """Begin a block of work in the calling thread, unless a block is under way already."""
        with self._lock:
            if self._status.is_done or (self._status.failure is not None and not self._depth):
                self._thread = WorkingThread(threading.get_ident())
                block = self._status.block + 1
                self._status = replace(self._status, block=block, is_done=False, failure=None, has_saved=False)
        self._exchange_now.set()

    @contextmanager
    def watched(self, position: Callable[[], Position], keep: Callable[[], object]) -> Iterator[None]:
        """Watch the rest of a block of work, which ends with the outermost such context.

        Args:
            position: returns the current work; called from any thread.
            keep: saves what would be lost, without waiting for another rank, and returns once that is saved; called
                from any thread, once the working thread is stuck.

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
                # A launcher that sees one rank end sends SIGTERM to the others, which would cut their messages short.
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
        """Return the loss of another rank that caused an error; None for an error of this rank's own."""
        if not _is_broken_connection(error):
            return None
        self._exchange_now.set()
        if self._is_loss_known.wait(GRACE_S):
            self._is_unwinding.set()
            return self.lost
        brief = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return LostRank(-1, f"the connection to another rank broke ({brief[:300]}), and no rank has said why")

    def _finish_saving(self, deadline: float) -> None:
        """Save what would be lost, on rank 0; the others wait: a launcher ends all ranks after the first."""
        if self._rank == 0:
            try:
                self._keep()
            except Exception:  # the process ends all the same, and its reason is in the log already
                traceback.print_exc()
            self._tell(has_saved=True)
            if not _launcher_holds_store():
                time.sleep(3 * self._beat_s)  # let the others hear before the store ends with this process
        while self._rank != 0 and time.monotonic() < deadline and not self._main_rank_is_over():
            time.sleep(self._beat_s / 2)

    def _main_rank_is_over(self) -> bool:
        main = self._ranks.get(0)
        if main is None or main.has_saved or main.block > self._status.block:  # it may have begun another block since
            return True
        return self._processes().get(0, "running") != "running"

    def _fail(self, text: str, of: int | None) -> None:
        if self._status.failure is None:
            self._tell(failure=text, failed_of=of)

    def _tell(self, **changes: Any) -> None:
        """Change this rank's status and report it, waiting until the store has it, or does not answer."""
        with self._lock:
            self._status = replace(self._status, **changes)
        if self._is_over.is_set():
            return
        self._exchanged.clear()
        self._exchange_now.set()
        self._exchanged.wait(2 * self._beat_s)

    def tell_soon(self) -> None:
        """Report this rank's status soon, without waiting."""
        self._exchange_now.set()

    def _stop(self) -> None:
        self._is_over.set()
        self._exchange_now.set()
        self._talker.join(self._beat_s)

    def _talk(self) -> None:
        """Exchange statuses with the store until the watch is over."""
        while not self._is_over.is_set():
            is_done = self._status.is_done
            try:
                self._exchange()
            except RuntimeError as error:  # the process that holds the store is gone
                logger.debug("the ranks' store does not answer: %s", error)
                self._is_over.set()
            if len(self._ranks) == len(self._others):
                self._are_all_known.set()
            self._exchanged.set()
            pause_s = None if is_done else self._beat_s
            self._exchange_now.wait(pause_s if self._are_all_known.is_set() else _MEETING_LOOK_S)
            self._exchange_now.clear()
        self._exchanged.set()

    def _exchange(self) -> None:
        position, still_s = self._position(), self._thread.look()
        # Processes first, statuses after: a last message that a rank sends before its end is then heard with that end.
        processes = self._processes()
        with self._lock:
            self._status = status = replace(
                self._status, beat=self._status.beat + 1, step=position.step, phase=position.phase,
                num_phases=position.num_phases, still_s=still_s, is_waiting=self._thread.is_waiting,
                place=self._thread.place, processes=processes,
            )
        self._store.set(str(self._rank), status.to_json())
        for rank in self._others:
            if rank in self._ranks or self._store.check([str(rank)]):
                self._hear(rank, RankStatus.from_json(self._store.get(str(rank))))
        self._store_answered = time.monotonic()

    def _hear(self, rank: int, status: RankStatus) -> None:
        last = self._ranks.get(rank)
        if last is None or last.beat != status.beat:
            self._heard_at[rank] = time.monotonic()
        with self._lock:
            self._ranks = self._ranks | {rank: status}

    def _watch(self) -> None:
        """Look for a lost rank until there is one, then end the process."""
        last_look = time.monotonic()
        while self.lost is None:
            time.sleep(self._beat_s / 2)
            now_s = time.monotonic()
            if now_s - last_look > 3 * self._beat_s:  # this process itself was stopped: hear the others first
                self._heard_at = dict.fromkeys(self._heard_at, now_s)
                self._store_answered = now_s
            last_look = now_s
            lost = self._look(now_s)
            if lost is not None and lost.is_gone:
                self._tell()  # exchange once more: hear the last message of the lost rank
                lost = self._look(now_s)
            self.lost = lost
        self._end(self.lost)

    def _look(self, now_s: float) -> LostRank | None:
        with self._lock:
            status, ranks = self._status, dict(self._ranks)
        if status.is_done or status.failure is not None:
            return None
        for rank in self._others:
            if rank not in ranks and now_s - self._started > self.timeout_s:
                age_s = now_s - self._started
                return LostRank(rank, f"rank {rank} has said nothing since the start, {age_s:.0f} s ago")
        if now_s - self._store_answered > min(self.timeout_s, _STORE_LIMIT_S):
            status = replace(status, processes=self._processes())
            self._hear_without_store(status.processes, now_s)
        silent_s = {rank: now_s - heard_at for rank, heard_at in self._heard_at.items()}
        return find_lost(ranks | {self._rank: status}, silent_s, this_rank=self._rank, timeout_s=self.timeout_s)

    def _hear_without_store(self, processes: Mapping[int, ProcessState], now_s: float) -> None:
        """Count ranks as heard while the store does not answer: all but those that are seen stopped or gone, and but
        the holder of the store on another machine."""
        for rank in self._others:
            holds_store = rank == 0 and not _launcher_holds_store()
            if processes.get(rank) == "running" or (rank not in processes and not holds_store):
                self._heard_at[rank] = now_s

    def _processes(self) -> dict[int, ProcessState]:
        """Return the process states of the other ranks on this machine."""
        return {
            rank: state_of(status.pid, status.started)
            for rank, status in self._ranks.items()
            if status.host == self._status.host
        }

    def _end(self, lost: LostRank) -> None:
        """End this process within `END_LIMIT_S`: by its working thread, if that comes back, else under it."""
        deadline = time.monotonic() + END_LIMIT_S
        self._is_loss_known.set()
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
    """Watch the ranks of this process group from now on. This begins a block of work, which ends with `watched`."""
    global _watchdog
    if num_ranks == 1 or not torch.distributed.is_initialized():
        return
    if _watchdog is None:
        default: Any = _get_default_store()
        _watchdog = RankWatchdog(PrefixStore(_PREFIX, default.clone()), rank, num_ranks, timeout_s)
    _watchdog.timeout_s = timeout_s
    _watchdog.begin()


def tell_position() -> None:
    """Report soon to the other ranks what this rank is doing now."""
    if _watchdog is not None:
        _watchdog.tell_soon()


@contextmanager
def watched(position: Callable[[], Position], keep: Callable[[], object]) -> Iterator[None]:
    """Watch work that all ranks do together; see `RankWatchdog.watched`. A single rank is not watched."""
    if _watchdog is None:
        yield
        return
    with _watchdog.watched(position, keep):
        yield


@contextmanager
def watched_set_up() -> Iterator[None]:
    """Watch the set-up of a run, in which `watch_ranks` is called.

    Raises:
        RankError: another rank is lost; see `RankWatchdog.watched`.
    """
    try:
        yield
    except BaseException:
        with watched(Position, lambda: None):
            raise


def _launcher_holds_store() -> bool:
    """Return whether the ranks' store is torchrun's, and not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _with_fix(lost: LostRank) -> str:
    return f"{lost.message}; correct what ended it, and go on by --resume"


def _is_broken_connection(error: BaseException) -> bool:
    """Return whether an error says that another rank no longer answers."""
    if isinstance(error, torch.distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(mark in text for mark in _BROKEN)
