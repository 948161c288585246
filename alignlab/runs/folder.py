"""The folder of a run. One live run has it at a time, and no run overwrites the results of another.

<output_dir>/
    starts.jsonl      a line for each start: the run's id, time, host, process, command, versions, commit, config
    ends.jsonl        a line for each start that ended by itself: how, and after which step
    config.yaml       the resolved config; config.2.yaml, ... if the run was resumed with another
    metrics.jsonl     rollouts/  checkpoints/  trackers/
    saved.json        the step of the newest checkpoint, by which a removed checkpoint is noticed
    models/           with checkpoints.with_model: models or adapters beside the checkpoints, under the same names
    adapter/ or model/   report.json  curves.png
"""

from __future__ import annotations

import itertools
import logging
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from alignlab.errors import CheckpointError, ConfigError
from alignlab.files.atomic_files import (
    REMOVED,
    REPLACED,
    TEMPORARY,
    make_folder,
    recover_folder,
    remove,
    write_atomically,
)
from alignlab.files.digests import sha256_of
from alignlab.files.library_errors import writing
from alignlab.files.paths import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    CURVES_FILE,
    ENDS_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    MODELS_FOLDER,
    REPORT_FILE,
    ROLLOUTS_FOLDER,
    SAVED_FILE,
    STARTS_FILE,
    TRACKERS_FOLDER,
    RunPaths,
)
from alignlab.runs.lock import LOCK_FILE, RunLock, in_use, is_alive
from alignlab.runs.provenance import start_record, timestamp
from alignlab.runs.records import append_record, read_records, read_saved_step, run_id_of, write_saved_step

logger = logging.getLogger(__name__)
RESULTS = (
    "config*.yaml", ENDS_FILE, SAVED_FILE, METRICS_FILE, CHECKPOINTS_FOLDER, ROLLOUTS_FOLDER, TRACKERS_FOLDER,
    ADAPTER_FOLDER, MODEL_FOLDER, MODELS_FOLDER, REPORT_FILE, CURVES_FILE,
)  # fmt: skip
"""Results of a run; their run is named by `starts.jsonl`, which is written before them."""
MAX_ERROR_CHARS = 500
ENDS_FIX = "put the file back as it was, or rename it: the file only records how earlier starts have ended"


class RunFolder(RunPaths):
    """A run's folder, locked until `close` or the end of the process, however it ends.

    Args:
        path: the folder; created if absent.
        resume: continue the run in the folder; otherwise the folder must hold no run.
        config_text: the resolved config, YAML or JSON, to be written beside the results.
        rank: rank 0 alone creates, checks, locks and writes; the other ranks only know the paths.
        part_of: id of the run that this run is a stage of; None if it is no stage.

    Attributes:
        last_end: the record of how the last start ended; None if it left none.
        run_id: 32 hexadecimal digits, drawn at the run's first start and written into all results. None on other
            ranks than 0, until it is sent to them.
        saved_step: step of the newest checkpoint that earlier starts have recorded; None if there is none.

    Raises:
        ConfigError: another live run has the folder; `resume` is true and it holds no run, or false and it holds one;
            it holds results without the `starts.jsonl` that names their run; or its run is a stage of another run.
        DiskError: the folder cannot be written.
    """

    def __init__(
        self, path: Path, *, resume: bool, config_text: str = "", rank: int = 0, part_of: str | None = None
    ) -> None:
        super().__init__(path.absolute())
        self.run_id: str | None = None
        self.last_end: dict[str, Any] | None = None
        self.saved_step: int | None = None
        self._lock: RunLock | None = None
        self._end: dict[str, Any] | None = None
        self._unrecorded: int | None = None
        if rank == 0:
            with writing(self.path, "the run's folder"):
                self._enter(config_text, resume=resume, part_of=part_of)

    def _enter(self, config_text: str, *, resume: bool, part_of: str | None) -> None:
        check_place(self.path)
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
    def _starts_file(self) -> Path:
        return self.path / STARTS_FILE

    def renew(self) -> None:
        """Check that the folder still belongs to this run; called before results are written.

        Raises:
            ConfigError: the folder was moved, or another process has locked it.
        """
        if self._lock is not None:
            self._lock.renew()

    def ended(self, outcome: str, step: int, metrics: Mapping[str, Any] | None = None) -> None:
        """Set how the run ended; `close` records it.

        Args:
            outcome: "done", "interrupted", "nothing learnt" or "failed".
            step: number of completed steps.
            metrics: of `MetricsLogger.state`; None if there are no metrics.
        """
        if self._end is not None:
            self._end |= {"outcome": outcome, "step": step, "metrics": metrics}

    def saved(self, step: int) -> None:
        """Record that the checkpoint of a step is complete; where that fails, `close` tries again."""
        self._unrecorded = None if write_saved_step(self.path / SAVED_FILE, self.run_id, step) else step

    def check_newest(self, step: int | None) -> None:
        """Compare the newest checkpoint with `saved.json`: warn if a newer one was saved and is gone.

        Args:
            step: step of the newest checkpoint; None if there is none.

        Raises:
            CheckpointError: checkpoints were saved, and none is left.
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
        """Record the end, and release the lock."""
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
            if self._unrecorded is not None:
                self.saved(self._unrecorded)
            if self._end is not None:
                append_record(self.path / ENDS_FILE, self._end | {"time": timestamp()} | _outcome(error))
        except OSError as problem:  # such as a full disk: the error that ended the run is reported, not this one
            logger.warning("the end of the run could not be recorded in %s: %s", self.path / ENDS_FILE, problem)
        finally:
            lock.close()

    def _check_last_start(self, starts: list[dict[str, Any]], part_of: str | None) -> None:
        """Raise if the last start is still alive or a stage of another run; warn if it left no record of its end."""
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
        """Remove the temporary files of a killed start, and restore a result that it was about to replace."""
        for result in (self.adapter, self.model):
            recover_folder(result)
        for folder in (self.path, self.checkpoints, self.rollouts, self.models):
            for kind in (TEMPORARY, REPLACED, REMOVED):
                for path in folder.glob(f".*.{kind}"):
                    remove(path)

    def _record(self, config_text: str, *, resume: bool, number: int, part_of: str | None) -> None:
        """Record the start and the config; `starts.jsonl` first, because it names the run of all other files."""
        config = next(
            (path for path in sorted(self.path.glob("config*.yaml")) if path.read_bytes() == config_text.encode()), None
        )
        file = self._unused_config_name() if config is None else config
        start = start_record(resume) | {
            "start": number,
            "run": self.run_id,
            "part_of": part_of,
            "config": {"file": file.name, "sha256": sha256_of(config_text)},
        }
        append_record(self._starts_file, start)
        self._end = {"run": self.run_id, "start": number, "outcome": "done"}
        if config is None:
            write_atomically(file, config_text)

    def _unused_config_name(self) -> Path:
        names = itertools.chain([CONFIG_FILE], (f"config.{number}.yaml" for number in itertools.count(2)))
        return next(self.path / name for name in names if not (self.path / name).exists())


def check_place(folder: Path) -> Path:
    """Return the folder, or the nearest existing one above it, after checking that a run's folder can be made there.

    Raises:
        ConfigError: a file or a link that leads to nothing is in the way, or permissions are missing.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    problem = None
    if not place.is_dir():
        problem = "is no folder" if place.exists() else "is a link that leads to nothing"
    elif not os.access(place, os.W_OK | os.X_OK):
        problem = "cannot be written"
    if problem is not None:
        raise ConfigError(
            f"trainer.output_dir is {folder}, and {place} {problem}; choose another trainer.output_dir"
        )
    return place


def check_folder(folder: Path, *, resume: bool) -> None:
    """Raise if no run can be started, or resumed, in a folder, which need not exist.

    Raises:
        ConfigError: see `RunFolder`.
    """
    has_run = holds_run(folder)
    if has_run and not resume:
        raise ConfigError(
            f"output_dir must not hold another run's results, and {folder} does; go on with that run by "
            "--resume, or choose another trainer.output_dir (nothing was overwritten)"
        )
    results = [] if has_run else sorted(path.name for name in RESULTS for path in folder.glob(name) if _is_result(path))
    if results:
        raise ConfigError(
            f"{folder} must hold a whole run or nothing of one, and holds {', '.join(results)} without the "
            f"{STARTS_FILE} that says which run made them; put that file back to go on with the run by --resume, "
            "or choose another trainer.output_dir (nothing was overwritten)"
        )
    if resume and not has_run:
        raise ConfigError(
            f"--resume needs a run to go on with, and {folder} holds none; leave --resume out to start one, "
            "or correct trainer.output_dir"
        )


def _check_files(folder: Path) -> None:
    """Raise if the path of a file is anything else, or a pipe is in the folder, which a reader would wait for.

    Raises:
        ConfigError: with the path.
    """
    names = (STARTS_FILE, ENDS_FILE, SAVED_FILE, METRICS_FILE, LOCK_FILE)
    for path in (*(folder / name for name in names), *folder.glob("config*.yaml")):
        if os.path.lexists(path) and not path.is_file():
            raise ConfigError(
                f"{path} must be a file, and is a folder, a pipe or a link that leads to none; put the file back, or "
                "choose another trainer.output_dir"
            )
    for place, _, files in os.walk(folder):
        pipe = next((path for name in files if (path := Path(place, name)).is_fifo()), None)
        if pipe is not None:
            raise ConfigError(
                f"{pipe} must be a file, and is a pipe, whose end may never come; put the file back, or remove the pipe"
            )


def holds_run(folder: Path) -> bool:
    """Return True if a run was started in a folder."""
    return (folder / STARTS_FILE).exists()


def output_of_run(folder: Path) -> Path | None:
    """Return the folder of the adapter or the model that a run has trained; None if there is none.

    Of a run of RLAIF, that is the product of its last stage.
    """
    runs = [folder, folder / "policy"]
    if (folder / "report.json").is_file() and not (folder / "policy").exists():
        runs.append(folder / "revision")  # the last stage of a finished run
    names = (f"{ADAPTER_FOLDER}/adapter_config.json", f"{MODEL_FOLDER}/config.json")
    return next((file.parent for run in runs for name in names if (file := run / name).is_file()), None)


def refuse_run(place: str, argument: str) -> None:
    """Raise if a place is the folder of a run, which holds a model or an adapter and is none.

    Args:
        argument: name of the argument or setting that gives the place.

    Raises:
        CheckpointError: with the folder to give instead.
    """
    folder = Path(place)
    if not holds_run(folder) or any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
        return
    output = output_of_run(folder)
    fix = "finish it by alignlab train --resume" if output is None else f"give {output}"
    holds = "has written no model and no adapter yet" if output is None else f"has written {output}"
    raise CheckpointError(f"{argument} must be a model or an adapter, and {place} is a run, which {holds}; {fix}")


def _is_result(path: Path) -> bool:
    """Return True for a file, and for a folder that is not empty."""
    return path.is_file() or any(path.iterdir())


def _outcome(error: BaseException | None) -> dict[str, str]:
    """Return the fields of a run's end record that an error changes; none without an error."""
    if error is None:
        return {}
    if isinstance(error, KeyboardInterrupt):  # by Ctrl-C or SIGTERM, outside the steps or a second time
        return {"outcome": "interrupted"}
    return {"outcome": "failed", "error": _described(error)}


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
