"""Metrics of a run: always a line of JSON for each step, and also accelerate's trackers if there are any."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers

from alignlab.errors import ConfigError
from alignlab.files.atomic_files import make_folder
from alignlab.files.library_errors import writing
from alignlab.files.paths import METRICS_FILE, TRACKERS_FOLDER
from alignlab.runs.metrics_file import MetricsFile

logger = logging.getLogger(__name__)
TENSORBOARD = "tensorboard"
PACKAGES = {"comet_ml": "comet-ml"}
"""Package of each tracker whose package has another name than the tracker."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise if a tracker is unknown or its package is not installed.

    Raises:
        ConfigError: with the name of the tracker.
    """
    installed = {str(tracker) for tracker in get_available_trackers()}
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise ConfigError(
                f"trainer.trackers holds {name!r}, and must hold names of accelerate's trackers; "
                f"use some of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}"
            )
        if name not in installed:
            raise ConfigError(
                f"trainer.trackers holds {name!r}, and its package is not installed; "
                f"pip install {PACKAGES.get(name, name)}, or leave it out (metrics.jsonl is always written)"
            )


class MetricsLogger:
    """Writes metrics.jsonl and the trackers, on the main process alone.

    A number that is not finite becomes null in the file, and "nonfinite" in the same line holds its name and value: so
    every line is valid JSON.

    Args:
        folder: the run's folder.
        trackers: names of accelerate's trackers.
        accelerator: knows which process is the main one; None for a single process.
        resume_step, last_step, saved, ended: see `MetricsFile`.

    Raises:
        ConfigError: a tracker is unknown, its package missing, or it cannot be started.
        CheckpointError: see `MetricsFile`.
    """

    def __init__(
        self,
        folder: Path,
        trackers: Sequence[str] = (),
        *,
        accelerator: Accelerator | None = None,
        resume_step: int | None = None,
        last_step: int | None = None,
        saved: Mapping[str, Any] | None = None,
        ended: Mapping[str, Any] | None = None,
    ) -> None:
        check_trackers(trackers)
        self._is_main = accelerator is None or accelerator.is_main_process
        self._trackers: list[GeneralTracker] = []
        if not self._is_main:
            return
        make_folder(folder)
        self._trackers_folder = folder / TRACKERS_FOLDER
        self._file = MetricsFile(
            folder / METRICS_FILE, resume_step=resume_step, last_step=last_step, saved=saved, ended=ended
        )
        try:
            for name in trackers:
                self._trackers.append(_started_tracker(name, folder, resume_step))
        except BaseException:
            self._file.close()
            raise

    def log(self, step: int, metrics: Mapping[str, float | int]) -> None:
        """Write the metrics of a step. Several lines may have one step, such as training's and an evaluation's.

        Raises:
            DiskError: the file, or those of a tracker, cannot be written.
        """
        if not self._is_main:
            return
        self._file.append(metrics_line(step, metrics))
        finite = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        for tracker in self._trackers:
            with writing(self._trackers_folder, f"what the tracker {tracker.name} shows"):
                tracker.log(finite, step=step)

    def state(self) -> dict[str, Any] | None:
        """Sync the file and return its state for a checkpoint, see `MetricsFile.state`; None on other processes."""
        return self._file.state() if self._is_main else None

    def close(self) -> None:
        """Close the file and the trackers."""
        if not self._is_main:
            return
        self._file.close()
        trackers, self._trackers = self._trackers, []
        for tracker in trackers:
            try:
                tracker.finish()
            except Exception as error:  # of any package; the model and its metrics are saved already
                logger.warning(
                    "the tracker %s could not be closed (%s: %s); %s has all metrics",
                    tracker.name, type(error).__name__, error, METRICS_FILE,
                )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def metrics_line(step: int, metrics: Mapping[str, float | int]) -> str:
    """Return the metrics of a step as one line of valid JSON."""
    assert not {"step", "time", "nonfinite"} & metrics.keys(), "these names are the line's own"
    values = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
    nonfinite = {name: str(value) for name, value in values.items() if not math.isfinite(value)}
    line: dict[str, Any] = {"step": step, "time": round(time.time(), 3)}
    line |= {name: None if name in nonfinite else value for name, value in values.items()}
    if nonfinite:
        line["nonfinite"] = nonfinite
    return json.dumps(line, allow_nan=False)


def _started_tracker(name: str, folder: Path, resume_step: int | None) -> GeneralTracker:
    try:
        tracker = _make_tracker(name, folder, resume_step)
        tracker.start()
    except Exception as error:  # of any package, such as one that needs a login
        raise ConfigError(
            f"trainer.trackers holds {name!r}, which cannot be started: {type(error).__name__}: {error}; set it up, or "
            f"leave it out (metrics.jsonl is always written), and go on with the run in {folder} by --resume"
        ) from error
    return tracker


def _make_tracker(name: str, folder: Path, resume_step: int | None) -> GeneralTracker:
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    options: dict[str, Any] = {}
    if tracker_class.requires_logging_directory:
        options["logging_dir"] = str(folder / TRACKERS_FOLDER)
    if name == TENSORBOARD:
        options["purge_step"] = (resume_step or 0) + 1  # removes all steps if there was no checkpoint yet
    tracker: GeneralTracker = tracker_class(folder.name, **options)
    return tracker
