"""The folder of a run: one live run in it at a time, and nothing in it is ever overwritten by another run.

<output_dir>/
    config.yaml       the resolved config; config.2.yaml, ... where a resumed run was given another
    starts.jsonl      a line for each start: time, host, process, command, versions, commit
    metrics.jsonl     rollouts/  checkpoints/  trackers/
    adapter/ or model/   report.json  curves.png
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import socket
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import alignlab
from alignlab.errors import ConfigError
from alignlab.training.files import write_atomically
from alignlab.training.metrics import METRICS_FILE

LOCK_FILE = ".lock"
CONFIG_FILE = "config.yaml"
STARTS_FILE = "starts.jsonl"
ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"
PACKAGES = ("alignlab", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")


class RunFolder:
    """A run's folder, locked until `close` or the end of the process, however it ends.

    Args:
        path: the folder; created if absent.
        resume: go on with the run that it holds; otherwise a folder that holds one is refused.
        config_text: the resolved config, YAML or JSON, to be kept beside the results.
        rank: only rank 0 creates, checks, locks and writes; the others know the paths.

    Raises:
        ConfigError: another live run has the folder; it holds a run and `resume` is false; or the other way round.
    """

    def __init__(self, path: Path, *, resume: bool, config_text: str = "", rank: int = 0) -> None:
        self.path = path.absolute()
        self._lock: IO[str] | None = None
        if rank != 0:
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = _take_lock(self.path)
        try:
            self._check(resume)
            self._record(config_text, resume)
        except BaseException:
            self.close()
            raise

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def rollouts(self) -> Path:
        return self.path / "rollouts"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER_FOLDER

    @property
    def model(self) -> Path:
        return self.path / MODEL_FOLDER

    @property
    def report_file(self) -> Path:
        return self.path / "report.json"

    @property
    def curves_file(self) -> Path:
        return self.path / "curves.png"

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, resume: bool) -> None:
        held = holds_run(self.path)
        if held and not resume:
            raise ConfigError(
                f"output_dir must not hold another run's results, and {self.path} does; go on with that run by "
                "--resume, or choose another trainer.output_dir (nothing was overwritten)"
            )
        if resume and not held:
            raise ConfigError(
                f"--resume needs a run to go on with, and {self.path} holds none; leave --resume out to start one, "
                "or correct trainer.output_dir"
            )

    def _record(self, config_text: str, resume: bool) -> None:
        """Keep the config and what it was started with. `starts.jsonl` comes last: it says that a run is here."""
        configs = sorted(self.path.glob("config*.yaml"))
        if all(path.read_text() != config_text for path in configs):
            name = CONFIG_FILE if not configs else f"config.{len(configs) + 1}.yaml"
            write_atomically(self.path / name, config_text)
        with (self.path / STARTS_FILE).open("a") as file:
            file.write(json.dumps(_start(resume)) + "\n")


def holds_run(folder: Path) -> bool:
    """Whether a run was started in this folder."""
    return (folder / STARTS_FILE).exists()


def made_in(folder: Path) -> Path | None:
    """The adapter or the model that the run in a folder has made; None where it has made none."""
    made = (folder / ADAPTER_FOLDER / "adapter_config.json", folder / MODEL_FOLDER / "config.json")
    return next((file.parent for file in made if file.is_file()), None)


def _take_lock(folder: Path) -> IO[str]:
    """Lock the folder for as long as the returned file is open; the kernel frees it when the process dies."""
    lock = (folder / LOCK_FILE).open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ConfigError(
            f"output_dir must belong to one live run, and {folder} is in use by {holder}; "
            "wait for it to end, stop it, or choose another trainer.output_dir"
        ) from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    # A forked child must not hold the lock on after this process was killed.
    os.register_at_fork(after_in_child=lock.close)
    return lock


def _start(resume: bool) -> dict[str, Any]:
    """What a run was started with."""
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "resume": resume,
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": source_commit(Path(alignlab.__file__).parent),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_commit(folder: Path) -> str | None:
    """The git commit of the sources in a folder, with "-dirty" if tracked files were changed; None if git has them not.

    An installed package may lie inside another project's repository: that one's commit says nothing about it.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command says; None where it fails or there is no git."""
    try:
        result = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
