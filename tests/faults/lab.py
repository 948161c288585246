"""A folder, a server and what uninterrupted runs make: all that an attack needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.faults import runs
from tests.faults.calls import is_supported
from tests.faults.operations import Operation, Plan, read_log
from tests.faults.results import differences

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 120.0
_PRELOADED = (
    "torch", "transformers", "peft", "accelerate", "alignlab.cli", "alignlab.run_from_config", "matplotlib.figure",
    "matplotlib.backends.backend_agg", "tests.faults.tasks",
)  # fmt: skip
_TASKS = "tests.faults.tasks"


@dataclass(frozen=True)
class Ending:
    """How a child ended.

    Attributes:
        status: exit status, or the negative number of the signal that killed it.
        was_ended: by the server, since it had not ended in time, or another rank had failed.
        text: all that it printed.
        value: what its task returned; None where it did not return.
        traceback: of the exception that ended it.
        operations: on files below its folder.
        memory_mib: that it held at most.
    """

    status: int
    was_ended: bool
    text: str
    value: Any
    traceback: str | None
    operations: int
    memory_mib: int

    @property
    def is_done(self) -> bool:
        """Whether the run came to its end."""
        return isinstance(self.value, dict) and self.value.get("exit") == 0

    @property
    def is_named(self) -> bool:
        """Whether the command ended with an error of one sentence."""
        return isinstance(self.value, dict) and self.value.get("exit") == 2

    @property
    def message(self) -> str:
        """The traceback or, without one, the last lines that it printed."""
        return (self.traceback or self.text).strip()[-1500:]


class Lab:
    """One worker's folder, and a server of its own.

    Args:
        folder: of the worker; what is in it is overwritten.

    Attributes:
        root: the working folder.
        notes: what attacks have found out once, by names of theirs.

    Raises:
        RuntimeError: the kernel cannot show operations on files to another process, or the server does not start.
    """

    def __init__(self, folder: Path) -> None:
        if not is_supported():
            raise RuntimeError("operations on files are watched by seccomp, which this kernel or machine has not")
        self.folder = folder.resolve()
        self.root = self.folder / "root"
        self._inputs, self._kept = self.folder / "inputs", self.folder / "kept"
        self._references: dict[str, dict[str, str]] = {}
        self.notes: dict[str, Any] = {}
        shutil.rmtree(self.folder, ignore_errors=True)
        for path in (self.root, self._kept, self.folder / "tmp"):
            path.mkdir(parents=True)
        self._server = _start_server(self.folder)
        self._ask({"preload": _PRELOADED})
        [made] = self.ask("make_inputs")
        assert made.traceback is None, made.traceback
        shutil.move(self.root / "inputs", self._inputs)
        self.clear()
        [told] = self.ask("modules_after", {"name": "grpo"})
        assert told.traceback is None, told.traceback
        self._ask({"preload": told.value})

    def close(self) -> None:
        """End the server."""
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=60)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def clear(self) -> None:
        """Empty the working folder but for the inputs."""
        shutil.rmtree(self.root)
        self.root.mkdir()
        shutil.copytree(self._inputs, self.root / "inputs")

    def keep(self, name: str) -> Path:
        """Copy the working folder, to be put back by `put_back`; returns where it is kept."""
        path = self._kept / name
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.root, path, symlinks=True)
        return path

    def kept(self, name: str) -> Path:
        """Where what is kept under this name is."""
        return self._kept / name

    def put_back(self, name: str) -> None:
        """Make the working folder as it was when it was kept under this name."""
        shutil.rmtree(self.root)
        shutil.copytree(self._kept / name, self.root, symlinks=True)

    def is_kept(self, name: str) -> bool:
        """Whether something is kept under this name."""
        return (self._kept / name).is_dir()

    def ask(
        self, task: str, arguments: dict[str, Any] | None = None, *, watched: bool = False, **options: Any
    ) -> list[Ending]:
        """Do a task in a child for each rank.

        Args:
            task: a function of `tasks`.
            watched: whether its operations on files are counted.
            options: see `server.answer`.
        """
        call = task if ":" in task else f"{_TASKS}:{task}"
        request: dict[str, Any] = {"root": str(self.root), "timeout_s": TIMEOUT_S} | options
        endings = self._ask(request | {"call": call, "arguments": arguments or {}, "watched": watched})
        return [
            Ending(
                told["status"], told["ended"], told["text"], told.get("value"), told.get("traceback"),
                told["operations"], told["memory_mib"],
            )
            for told in endings
        ]

    def train(
        self, name: str, *, plan: Plan | None = None, armed_rank: int = 0, log: Path | None = None,
        timeout_s: float = TIMEOUT_S, grace_s: float = 0.0, **arguments: Any,
    ) -> list[Ending]:
        """Run `alignlab train` in the working folder, on the ranks that the name says."""
        run, ranks = runs.split_name(name)
        environment = {"ALIGNLAB_CACHE": str(self.root / "cache"), "TMPDIR": str(self.folder / "tmp")}
        if ranks > 1:
            environment |= {
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(_free_port()), "GLOO_SOCKET_IFNAME": "lo",
            }  # fmt: skip
        options: dict[str, Any] = {} if log is None else {"log": str(log)}
        return self.ask(
            "train", {"name": run, **arguments}, watched=True, ranks=ranks, environment=environment,
            armed_rank=armed_rank, plan={} if plan is None else vars(plan), timeout_s=timeout_s, grace_s=grace_s,
            **options,
        )

    def made(self) -> dict[str, str]:
        """What the run in the working folder has made.

        Raises:
            ValueError: it cannot be read.
        """
        [ending] = self.ask("made")
        if ending.traceback is not None:
            raise ValueError(ending.traceback)
        found: dict[str, str] = ending.value
        return found

    def reference(self, name: str) -> dict[str, str]:
        """What a run makes that nothing interrupts; its folder is kept under the run's name, its log beside it."""
        if name not in self._references:
            self.clear()
            endings = self.train(name, log=self.folder / f"{name}.log")
            failed = [ending for ending in endings if not ending.is_done]
            assert not failed, f"{name} does not run: {failed[0].message}"
            self._references[name] = self.made()
            self.keep(name)
        return self._references[name]

    def log_of(self, name: str, rank: int = 0) -> list[Operation]:
        """The operations of one rank of an uninterrupted run."""
        self.reference(name)
        return read_log(self.folder / f"{name}.log.{rank}")

    def unlike(self, name: str) -> list[str]:
        """In what the run in the working folder differs from one that nothing interrupted."""
        expected = self._references[name]  # making them would take the folder
        try:
            return differences(self.made(), expected)
        except ValueError as error:
            return [f"what was made cannot be read: {error}"]

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError(f"the server of {self.folder} has ended, see its messages in {self.folder}/server.txt")
        return json.loads(line)


def _start_server(folder: Path) -> subprocess.Popen[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive",
        "PYTHONDONTWRITEBYTECODE": "1",  # of a plug-in in `inputs`, beside what runs write
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0",
        "PYTHONWARNINGS": "ignore",
    }  # fmt: skip
    with (folder / "server.txt").open("w") as messages:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=messages, text=True, env=environment, cwd=folder,
        )


def _free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
