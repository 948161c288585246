"""Names of the files and folders that alignlab makes: in this user's cache, and in the folder of a run."""

from __future__ import annotations

import os
from pathlib import Path

from alignlab.files.home_folder import with_home

CONFIG_FILE = "config.yaml"
STARTS_FILE, ENDS_FILE, SAVED_FILE = "starts.jsonl", "ends.jsonl", "saved.json"
METRICS_FILE, REPORT_FILE, CURVES_FILE = "metrics.jsonl", "report.json", "curves.png"
CHECKPOINTS_FOLDER, ROLLOUTS_FOLDER, TRACKERS_FOLDER = "checkpoints", "rollouts", "trackers"
ADAPTER_FOLDER, MODEL_FOLDER, MODELS_FOLDER = "adapter", "model", "models"


def cache_folder() -> Path:
    """Return the folder of what may be made again: `$ALIGNLAB_CACHE`, or `~/.cache/alignlab`.

    Raises:
        ConfigError: neither is known.
    """
    chosen = os.environ.get("ALIGNLAB_CACHE")
    return with_home(chosen or "~/.cache/alignlab")


def reference_cache_folder() -> Path:
    """Return the folder of log-probs under reference models."""
    return cache_folder() / "reference"


def teacher_cache_folder() -> Path:
    """Return the folder of teachers' likeliest tokens."""
    return cache_folder() / "teacher"


def judge_answers_file() -> Path:
    """Return the database of judges' answers."""
    return cache_folder() / "judge" / "answers.sqlite"


def server_token_file() -> Path:
    """Return the file of the token that this user's vLLM servers require."""
    return cache_folder() / "server-token"


class RunPaths:
    """The files and folders in the folder of a run.

    Args:
        path: the run's folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def metrics_file(self) -> Path:
        return self.path / METRICS_FILE

    @property
    def rollouts(self) -> Path:
        return self.path / ROLLOUTS_FOLDER

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_FOLDER

    @property
    def adapter(self) -> Path:
        return self.path / ADAPTER_FOLDER

    @property
    def model(self) -> Path:
        return self.path / MODEL_FOLDER

    @property
    def models(self) -> Path:
        return self.path / MODELS_FOLDER

    @property
    def report_file(self) -> Path:
        return self.path / REPORT_FILE

    @property
    def curves_file(self) -> Path:
        return self.path / CURVES_FILE
