"""Ranks of a launcher, forked from a process that has imported everything once: a new interpreter takes seconds.

A fork has the seed of its parent's string hashes, so the ranks of one test iterate over a set in one order; tests of
the real torchrun (`torchrun`) have ranks with seeds of their own.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

from tests.curves import draw_no_curves

ROOT = Path(__file__).parents[1]
LOCALHOST = "127.0.0.1"
_TIMEOUT_S = 240
_FORKS = multiprocessing.get_context("forkserver")
# All that the ranks of the tests import, also in the middle of their work: accelerate does so with deepspeed, if it is
# installed. A module that is not there is left out.
_FORKS.set_forkserver_preload(
    [
        "tests.ranks", "alignlab.cli", "alignlab.run_from_config", "tests.loop.rank_faults",
        "tests.loop.rank_gradients", "tests.loop.rank_held_out", "tests.loop.rank_training", "tests.loop.rank_uneven",
        "tests.trainers.rank_cases", "deepspeed",
    ]
)


class Rank:
    """A forked process that runs a script or a module as Python's main program.

    Args:
        arguments: path of a script, or -m and the name of a module; then the program's arguments.
        environment: all variables of the process.
        folder: takes the output.

    Attributes:
        pid: number of the process.
    """

    def __init__(self, arguments: Sequence[str], environment: dict[str, str], folder: Path) -> None:
        self._outputs = tuple(folder / f"{name}{environment['RANK']}" for name in ("stdout", "stderr"))
        self._process = _FORKS.Process(target=_run, args=(list(arguments), environment, self._outputs))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.sentinel = self._process.sentinel

    @property
    def returncode(self) -> int | None:
        """Exit status, or the negative number of the signal that ended it; None while it runs."""
        return self._process.exitcode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end, and return standard output and standard error."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("rank", timeout)
        stdout, stderr = (path.read_text(errors="replace") for path in self._outputs)
        return stdout, stderr

    def send_signal(self, number: int) -> None:
        """Send a signal to the process, unless it has ended."""
        if self._process.exitcode is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask the process to end."""
        self._process.terminate()

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()
        self._process.join()


def _run(arguments: list[str], environment: dict[str, str], outputs: Sequence[Path]) -> None:
    """Be the rank, in the forked process."""
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    draw_no_curves()
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:  # what an interpreter does at its end, and a fork of `multiprocessing` does not
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()


@contextmanager
def launcher_store() -> Iterator[int]:
    """Hold a store, as a launcher does, and yield its port."""
    store = TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    yield store.port
    del store


@contextmanager
def start_ranks(arguments: Sequence[str], port: int, *, count: int = 2, agent: bool = True) -> Iterator[list[Rank]]:
    """Start the ranks of one machine as a launcher does; kill them at the end of the context.

    Args:
        arguments: as `Rank` takes them.
        port: where the store is, or is made.
        agent: whether this process holds the store, as torchrun does; else rank 0 holds it.
    """
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": LOCALHOST, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(agent),
    }
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            Rank(arguments, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, Path(folder))
            for rank in range(count)
        ]
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.kill()


def run_ranks(*arguments: str, count: int = 2) -> subprocess.CompletedProcess[str]:
    """Run a script, or a module after -m, on forked ranks, and return their end as torchrun's.

    Like torchrun, ask all ranks to end once one has failed.
    """
    with launcher_store() as port, start_ranks(arguments, port, count=count) as ranks:
        running = {rank.sentinel: rank for rank in ranks}
        while running:
            ended = [running.pop(sentinel) for sentinel in wait(list(running), _TIMEOUT_S)]
            if not ended:
                raise subprocess.TimeoutExpired(arguments, _TIMEOUT_S)
            if any(rank.returncode for rank in ended):
                for rank in running.values():
                    rank.terminate()
        outputs = [rank.communicate(_TIMEOUT_S) for rank in ranks]
        status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    stdout, stderr = ("".join(texts) for texts in zip(*outputs, strict=True))
    return subprocess.CompletedProcess(arguments, status or 0, stdout, stderr)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script, or a module after -m, on two ranks by the real torchrun."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=_TIMEOUT_S, check=False)
