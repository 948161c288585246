"""Ranks of a launcher: forked ones, whose string hashes have seeds of their own, and those of the real torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path

from torch.distributed import TCPStore

from tests.forks import Fork, ForkServer

ROOT = Path(__file__).parents[1]
LOCALHOST = "127.0.0.1"
TIMEOUT_S = 240
# All that the ranks of the tests import, also in the middle of their work: accelerate does so with deepspeed, if it is
# installed, deepspeed with its optimizers and torch's compiler, and the check of a run's end with what draws curves.
# Two servers, so that two ranks have hashes of their own, as the ranks of torchrun do.
_SERVERS = tuple(
    ForkServer(
        "alignlab.cli", "alignlab.run_from_config", "tests.loop.rank_faults", "tests.loop.rank_gradients",
        "tests.loop.rank_held_out", "tests.loop.rank_resuming", "tests.loop.rank_training", "tests.loop.rank_uneven",
        "tests.trainers.rank_cases", "matplotlib.figure", "numpy.ctypeslib",
        "torch.distributed.algorithms.ddp_comm_hooks",
        optional=[
            "deepspeed", "deepspeed.ops.op_builder.all_ops", "deepspeed.runtime.zero.muon.muon_optimizer",
            "deepspeed.module_inject.auto_ep_layer",
        ],
    )
    for _ in range(2)
)  # fmt: skip


@contextmanager
def launcher_store() -> Iterator[int]:
    """Hold a store, as a launcher does, and yield its port."""
    store = TCPStore(LOCALHOST, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    yield store.port
    del store


@contextmanager
def start_ranks(
    arguments: Sequence[str], port: int, *, count: int = 2, agent: bool = True,
    servers: Sequence[ForkServer] = _SERVERS,
) -> Iterator[list[Fork]]:
    """Start the ranks of one machine as a launcher does; kill them at the end of the context.

    Args:
        arguments: as `Fork` takes them.
        port: where the store is, or is made.
        agent: whether this process holds the store, as torchrun does; else rank 0 holds it.
        servers: fork the ranks, in turn.
    """
    ForkServer.make_ready(servers)  # before the first rank waits for the others
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": LOCALHOST, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": str(agent),
    }
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            Fork(
                servers[rank % len(servers)], arguments, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                (Path(folder, f"{rank}.out"), Path(folder, f"{rank}.err")),
            )
            for rank in range(count)
        ]  # fmt: skip
        try:
            yield ranks
        finally:
            for rank in ranks:
                rank.kill()


def run_ranks(
    *arguments: str, count: int = 2, servers: Sequence[ForkServer] = _SERVERS
) -> subprocess.CompletedProcess[str]:
    """Run a script, or a module after -m, on forked ranks, and return their end as torchrun's.

    Like torchrun, ask all ranks to end once one has failed.

    Args:
        servers: fork the ranks, in turn.
    """
    with launcher_store() as port, start_ranks(arguments, port, count=count, servers=servers) as ranks:
        running = {rank.sentinel: rank for rank in ranks}
        while running:
            ended = [running.pop(sentinel) for sentinel in wait(list(running), TIMEOUT_S)]  # type: ignore[index]
            if not ended:
                raise subprocess.TimeoutExpired(arguments, TIMEOUT_S)
            if any(rank.returncode for rank in ended):
                for rank in running.values():
                    rank.terminate()
        outputs = [rank.communicate(TIMEOUT_S) for rank in ranks]
        status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    stdout, stderr = ("".join(texts) for texts in zip(*outputs, strict=True))
    return subprocess.CompletedProcess(arguments, status or 0, stdout, stderr)


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script, or a module after -m, on two ranks by the real torchrun."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=TIMEOUT_S, check=False)
