"""The number of threads that compute on the CPU follows the cores that other processes leave free.

A parallel product takes as long as its slowest thread. If another process uses a core, the thread on that core waits
for its turn, and the other threads wait for that thread: beside two busy processes on two cores, two threads are slower
than one. How long a waiting thread spins can only be chosen before the process starts; the number of threads can be
changed at any time, between two products.

With another number of threads, sums are computed in another order and round differently in the last bit. To get the
same bits even beside busy processes, set `OMP_NUM_THREADS`: the number of threads then stays constant.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

logger = logging.getLogger(__name__)
WINDOW_S = 0.5
"""Shortest time over which the use of the cores is measured."""
CONFIRMATIONS = 2
"""Windows in a row that must ask for the same number of threads before it changes."""
SPARE_CORES = 0.45
"""Share of a core that other processes may use without costing a thread."""
_IDLE = ("idle", "iowait")
_COUNTED_TWICE = ("guest", "guest_nice")  # the kernel counts them under user and nice too
_QUOTA_FILE = Path("/sys/fs/cgroup/cpu.max")  # of control groups, version 2


@dataclass(frozen=True)
class CpuUsage:
    """Seconds of core time since some fixed moment.

    Attributes:
        wall_s: time that passed.
        busy_s: core time that all processes used together, on the cores that this process may run on.
        process_s: core time that this process used.
    """

    wall_s: float
    busy_s: float
    process_s: float


def read_cpu_usage() -> CpuUsage:
    """Return the use of the cores so far, by the operating system's counts."""
    allowed = _allowed_cores()
    busy_s = 0.0
    for core, times in enumerate(psutil.cpu_times(percpu=True)):
        if core in allowed:
            busy_s += sum(s for name, s in times._asdict().items() if name not in _IDLE + _COUNTED_TWICE)
    return CpuUsage(time.monotonic(), busy_s, time.process_time())


class CpuThreads:
    """Chooses how many threads compute.

    Args:
        limit: most threads, >= 1.
        num_cores: cores that this process may use, >= 1.
        read: measures the use of the cores.
        clock: seconds since some fixed moment; the `wall_s` of `read`.

    Attributes:
        num_threads: number of threads to compute with now.
    """

    def __init__(
        self,
        limit: int,
        num_cores: float,
        read: Callable[[], CpuUsage] = read_cpu_usage,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limit, self.num_cores = limit, num_cores
        self.num_threads = limit
        self._read, self._clock = read, clock
        self._last = read()
        self._proposal, self._confirmations = limit, 0
        self._has_warned = False

    def update(self) -> int:
        """Measure, if enough time has passed, and return the number of threads to compute with.

        It is one thread for each core that other processes leave free, and at least one. It changes when two windows in
        a row ask for the same new number.
        """
        if self._clock() - self._last.wall_s < WINDOW_S:
            return self.num_threads
        usage = self._read()
        others_s = (usage.busy_s - self._last.busy_s) - (usage.process_s - self._last.process_s)
        occupied_cores = max(0.0, others_s / (usage.wall_s - self._last.wall_s))
        self._last = usage
        proposal = max(1, min(self.limit, math.floor(self.num_cores - occupied_cores + SPARE_CORES)))
        self._confirmations = self._confirmations + 1 if proposal == self._proposal else 1
        self._proposal = proposal
        if proposal != self.num_threads and self._confirmations >= CONFIRMATIONS:
            self._change(proposal, occupied_cores)
        return self.num_threads

    def _change(self, num_threads: int, occupied_cores: float) -> None:
        if not self._has_warned and num_threads < self.num_threads:
            logger.warning(
                "other processes use %.1f of %g cores: computing with %d thread(s) instead of %d until they are done; "
                "another number of threads rounds otherwise in the last bit, so set OMP_NUM_THREADS where runs must be "
                "equal bit for bit beside busy processes",
                occupied_cores, self.num_cores, num_threads, self.num_threads,
            )  # fmt: skip
            self._has_warned = True
        self.num_threads = num_threads


_threads: CpuThreads | None = None
_initial_threads = 0  # of torch, before any change
_is_settable = True


def follow_free_cores() -> int:
    """Compute with as many threads as there are free cores, from now on, in the calling thread; return their number.

    May be called often, between two pieces of work: it measures twice a second at most. Nothing changes if the
    environment has `OMP_NUM_THREADS`, or if vLLM in this process has bound its threads to cores and keeps their number.
    A number that the user gives to `torch.set_num_threads` is the new limit.
    """
    global _initial_threads, _is_settable, _threads
    current = torch.get_num_threads()  # OpenMP's number is the calling thread's own
    if "OMP_NUM_THREADS" in os.environ or not _is_settable:
        return current
    if _threads is None:
        _initial_threads, num_cores = current, available_cores()
        _threads = CpuThreads(max(1, min(current, math.ceil(num_cores))), num_cores)
    elif current not in (_threads.num_threads, _threads.limit, _initial_threads):
        _threads.limit = _threads.num_threads = current
    num_threads = _threads.update()
    if current != num_threads:
        torch.set_num_threads(num_threads)
        _is_settable = torch.get_num_threads() == num_threads
    return torch.get_num_threads()


def available_cores() -> float:
    """Return how many cores this process may use: those it may run on, within its container's share of time."""
    num_cores = float(len(_allowed_cores()))
    if not _QUOTA_FILE.is_file():
        return num_cores
    quota, _, period = _QUOTA_FILE.read_text().partition(" ")
    return num_cores if quota == "max" else min(num_cores, max(1.0, int(quota) / int(period)))


def _allowed_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
