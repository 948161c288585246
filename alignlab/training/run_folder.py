"""The folder of a run: one live run in it at a time, and nothing in it is ever overwritten by another run.

<output_dir>/
    starts.jsonl      a line for each start: the run's id, time, host, process, command, versions, commit, config
    ends.jsonl        a line for each of them that ended by itself: how, and after which step
    config.yaml       the resolved config; config.2.yaml, ... where a resumed run was given another
    metrics.jsonl     rollouts/  checkpoints/  trackers/
    saved.json        the step of the newest checkpoint, which is missed where it is gone
    adapter/ or model/   report.json  curves.png
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import alignlab
from alignlab.atomic_files import REMOVED, REPLACED, TEMPORARY, make_folder, recover_folder, write_atomically
from alignlab.errors import CheckpointError, ConfigError
from alignlab.library_errors import writing
from alignlab.training.metrics_file import METRICS_FILE
from alignlab.training.run_lock import LOCK_FILE, RunLock, identity_of_process, in_use, is_alive
from alignlab.training.run_records import append_record, read_records, read_saved_step, run_id_of, write_saved_step

logger = logging.getLogger(__name__)
CONFIG_FILE = "config.yaml"
STARTS_FILE, ENDS_FILE, SAVED_FILE = "starts.jsonl", "ends.jsonl", "saved.json"
ADAPTER_FOLDER, MODEL_FOLDER = "adapter", "model"
MADE = (
    "config*.yaml", ENDS_FILE, SAVED_FILE, METRICS_FILE, "checkpoints", "rollouts", "trackers", ADAPTER_FOLDER,
    MODEL_FOLDER, "report.json", "curves.png",
)  # fmt: skip
"""What a run makes in its folder; `starts.jsonl`, which comes first, says which run that is."""
PACKAGES = ("alignlab", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors", "numpy")
MAX_ERROR_CHARS = 500
ENDS_FIX = "put the file back as it was, or rename it: it only says how earlier starts have ended"


class RunFolder:
    """A run's folder, locked until `close` or the end of the process, however it ends.

    Args:
        path: the folder; created if absent.
        resume: go on with the run that it holds; otherwise a folder that holds one is refused.
        config_text: the resolved config, YAML or JSON, to be kept beside the results.
        rank: only rank 0 creates, checks, locks and writes; the others know the paths.
        part_of: id of the run that this run is a stage of; None where it is none.

    Attributes:
        last_end: the record of how the last start ended; None where there is none.
        run_id: 32 hexadecimal digits, drawn at the run's first start, in all that the run makes. Other ranks than 0
            have to be told.
        saved_step: of the newest checkpoint that earlier starts have recorded; None where there is none.

    Raises:
        ConfigError: another live run has the folder; it holds a run and `resume` is false, or the other way round; it
            holds what a run has made without the `starts.jsonl` that says which; or it is a stage of another run.
        DiskError: the disk, a limit or a permission.
    """

    def __init__(
        self, path: Path, *, resume: bool, config_text: str = "", rank: int = 0, part_of: str | None = None
    ) -> None:
        self.path = path.absolute()
        self.run_id: str | None = None
        self.last_end: dict[str, Any] | None = None
        self.saved_step: int | None = None
        self._lock: RunLock | None = None
        self._end: dict[str, Any] | None = None
        if rank == 0:
            with writing(self.path, "the run's folder"):
                self._enter(config_text, resume=resume, part_of=part_of)

    def _enter(self, config_text: str, *, resume: bool, part_of: str | None) -> None:
        make_folder(self.path)
        _check_files(self.path)
        self._lock = RunLock(self.path)
        try:
            check_folder(self.path, resume=resume)
            starts = read_records(self._starts_file)
            self.run_id = run_id_of(self._starts_file) if resume else uuid.uuid4().hex
            if resume:
                self._check_last_start(starts, part_of)
                self._clear_leftovers()
                self.saved_step = read_saved_step(self.path / SAVED_FILE, self.run_id)
            self._record(config_text, resume=resume, number=len(starts) + 1, part_of=part_of)
        except BaseException as error:
            self._close(error)
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

    @property
    def _starts_file(self) -> Path:
        return self.path / STARTS_FILE

    def renew(self) -> None:
        """Make sure that the folder is still this run's, before something is written that it may have lost by then.

        Raises:
            ConfigError: it was moved, or another process has taken it.
        """
        if self._lock is not None:
            self._lock.renew()

    def ended(self, outcome: str, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Say how the run ended, for the record of its end.

        Args:
            outcome: "done", "interrupted", "nothing learnt" or "failed".
            step: the last that is done.
            metrics: what `MetricsLogger.state` gives; None where there are none.
        """
        if self._end is not None:
            self._end |= {"outcome": outcome, "step": step, "metrics": metrics}

    def saved(self, step: int) -> None:
        """Record that the checkpoint of a step is complete."""
        write_saved_step(self.path / SAVED_FILE, self.run_id, step)

    def check_newest(self, step: int | None) -> None:
        """Say if a newer checkpoint than that of a step was saved and is gone; record a newer one than is recorded.

        Args:
            step: that the run goes on after; None where there is no checkpoint.

        Raises:
            CheckpointError: none is left.
        """
        recorded = -1 if self.saved_step is None else self.saved_step
        if step is not None and step >= recorded:
            if step > recorded and self._lock is not None:
                self.saved(step)  # the run was ended between the checkpoint and its record
            return
        if self.saved_step is None:
            return
        if step is None:
            raise CheckpointError(
                f"the run has saved a checkpoint of step {self.saved_step}, and {self.checkpoints} holds none; put it "
                "back, or begin again in another trainer.output_dir"
            )
        logger.warning("the newest checkpoint, of step %d, is gone: going on after step %d", self.saved_step, step)

    def close(self) -> None:
        """Record the end, and give the lock back."""
        self._close(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close(error)

    def _close(self, error: BaseException | None) -> None:
        lock, self._lock = self._lock, None
        if lock is None:
            return
        try:
            if self._end is not None:
                failed = {} if error is None else {"outcome": "failed", "error": _described(error)}
                append_record(self.path / ENDS_FILE, self._end | {"time": _now()} | failed)
        except OSError as problem:  # such as a full disk, which ended the run: that is what has to be told
            logger.warning("the end of the run could not be recorded in %s: %s", self.path / ENDS_FILE, problem)
        finally:
            lock.close()

    def _check_last_start(self, starts: list[dict[str, Any]], part_of: str | None) -> None:
        """Raise if the last start is still alive or a stage of another run; say if it ended without a word."""
        last = starts[-1]
        if last.get("part_of") != part_of:
            raise ConfigError(
                f"{self.path} must be a stage of the run {part_of}, and is one of {last.get('part_of')}; put the stage "
                "back that was there, or remove the folder to run the stage again"
            )
        ends = {end.get("start"): end for end in read_records(self.path / ENDS_FILE, fix=ENDS_FIX)}
        self.last_end = ends.get(last.get("start"))
        if self.last_end is not None:
            return
        process = f"process {last.get('process')} on {last.get('host')}"
        if is_alive(last):
            raise in_use(self.path, process)
        logger.warning(
            "the run in %s did not end by itself when it was last started (%s, %s): it was killed, or code that it "
            "called ended the process", self.path, process, last.get("time"),
        )  # fmt: skip

    def _clear_leftovers(self) -> None:
        """Remove what a killed start was about to write, and bring back what it was about to replace."""
        for made in (self.adapter, self.model):
            recover_folder(made)
        for folder in (self.path, self.checkpoints, self.rollouts):
            for kind in (TEMPORARY, REPLACED, REMOVED):
                for path in folder.glob(f".*.{kind}"):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _record(self, config_text: str, *, resume: bool, number: int, part_of: str | None) -> None:
        """Keep what the run was started with, and the config. `starts.jsonl` comes first: it says which run this is."""
        config = next(
            (path for path in sorted(self.path.glob("config*.yaml")) if path.read_bytes() == config_text.encode()), None
        )
        file = self._unused_config_name() if config is None else config
        start = _start(resume) | {
            "start": number,
            "run": self.run_id,
            "part_of": part_of,
            "config": {"file": file.name, "sha256": hashlib.sha256(config_text.encode()).hexdigest()},
        }
        append_record(self._starts_file, start)
        self._end = {"run": self.run_id, "start": number, "outcome": "done"}
        if config is None:
            write_atomically(file, config_text)

    def _unused_config_name(self) -> Path:
        names = itertools.chain([CONFIG_FILE], (f"config.{number}.yaml" for number in itertools.count(2)))
        return next(self.path / name for name in names if not (self.path / name).exists())


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raise if no run can be started in a folder, which need not exist, or none be gone on with.

    Raises:
        ConfigError: see `RunFolder`.
    """
    held = holds_run(folder)
    if held and not resume:
        raise ConfigError(
            f"output_dir must not hold another run's results, and {folder} does; go on with that run by "
            "--resume, or choose another trainer.output_dir (nothing was overwritten)"
        )
    made = [] if held else sorted(path.name for name in MADE for path in folder.glob(name) if _is_made(path))
    if made:
        raise ConfigError(
            f"{folder} must hold a whole run or nothing of one, and holds {', '.join(made)} without the "
            f"{STARTS_FILE} that says which run made them; put that file back to go on with the run by --resume, "
            "or choose another trainer.output_dir (nothing was overwritten)"
        )
    if resume and not held:
        raise ConfigError(
            f"--resume needs a run to go on with, and {folder} holds none; leave --resume out to start one, "
            "or correct trainer.output_dir"
        )


def _check_files(folder: Path) -> None:
    """Raise if what has to be a file is anything else, such as a pipe, which would be waited for without an end."""
    names = (STARTS_FILE, ENDS_FILE, SAVED_FILE, METRICS_FILE, LOCK_FILE)
    for path in (*(folder / name for name in names), *folder.glob("config*.yaml")):
        if os.path.lexists(path) and not path.is_file():
            raise ConfigError(
                f"{path} must be a file, and is a folder, a pipe or a link that leads to none; put the file back, or "
                "choose another trainer.output_dir"
            )


def holds_run(folder: Path) -> bool:
    """Whether a run was started in this folder."""
    return (folder / STARTS_FILE).exists()


def made_in(folder: Path) -> Path | None:
    """The adapter or the model that the run in a folder has made; None where it has made none."""
    made = (folder / ADAPTER_FOLDER / "adapter_config.json", folder / MODEL_FOLDER / "config.json")
    return next((file.parent for file in made if file.is_file()), None)


def _is_made(path: Path) -> bool:
    """Whether there is something of a run: a file, or a folder that is not empty."""
    return path.is_file() or any(path.iterdir())


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _start(resume: bool) -> dict[str, Any]:
    """What a run was started with."""
    return {
        "time": _now(),
        "resume": resume,
        **identity_of_process(),
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
    commit = _git(folder, "describe", "--always", "--abbrev=40", "--exclude=*")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")  # `describe --dirty` locks the index
    return None if commit is None or changed is None else f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """What a git command says; None where it fails or there is no git."""
    try:
        result = subprocess.run(  # which must leave no lock behind if it is killed
            ["git", "--no-optional-locks", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10,
            check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None
