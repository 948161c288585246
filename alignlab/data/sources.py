"""Rows of a dataset, from wherever they are: a local file, the Hub, a task's generator."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from alignlab.config.data import DataSettings
from alignlab.data.tasks import task_rows
from alignlab.errors import ConfigError, DataError


def load_rows(settings: DataSettings) -> Iterable[Mapping[str, Any]]:
    """The rows of the source that `settings` names, before anything is done with them."""
    if (settings.path is None) == (settings.task is None):
        raise ConfigError(
            f"data needs exactly one of path and task, and has path={settings.path!r}, task={settings.task!r}; "
            "set one of them, or pass rows to the trainer"
        )
    if settings.task is not None:
        return task_rows(
            settings.task,
            options=settings.task_options,
            split=settings.split,
            size=settings.size,
            eval_frac=settings.eval_frac,
            seed=settings.seed,
        )
    assert settings.path is not None
    reader = _READERS.get(Path(settings.path).suffix.lower())
    if reader is None:
        return _hub_rows(settings.path, settings)
    if not Path(settings.path).is_file():
        raise DataError(f"data.path must be an existing file, and {settings.path} is none; correct the path")
    return reader(settings.path)


@contextmanager
def _opened(path: str, **options: Any) -> Iterator[TextIO]:
    """A text file in UTF-8, with or without a byte-order mark."""
    try:
        with open(path, encoding="utf-8-sig", **options) as lines:
            yield lines
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be text in UTF-8, and is not: {error}; convert it") from error


def _jsonl_rows(path: str) -> Iterator[Mapping[str, Any]]:
    """Line by line, because Arrow's reader refuses a whole file for one line and cannot say which."""
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_object(path, f"line {number}", line)


def _json_object(path: str, place: str, text: str) -> Mapping[str, Any]:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: {place} must be a JSON object, and is not JSON: {error}; correct the line") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}: {place} must be a JSON object, and is {type(row).__name__}; correct the line")
    return row


def _json_rows(path: str) -> list[Mapping[str, Any]]:
    try:
        with _opened(path) as file:
            rows = json.load(file)
    except json.JSONDecodeError as error:
        raise DataError(f"{path} must be a JSON list of objects, and is not JSON: {error}; correct the file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise DataError(f"{path} must be a JSON list of objects, and is another value; use .jsonl for one a line")
    return rows


def _csv_rows(path: str) -> Iterator[Mapping[str, Any]]:
    """Every value is text, so that an answer "007" stays what it is."""
    csv.field_size_limit(2**31 - 1)
    with _opened(path, newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines)):
            if None in row:
                raise DataError(
                    f"{path}: row {number} (the first is 0) has more fields than the header names; "
                    "put fields that hold commas in quotes"
                )
            yield row


def _parquet_rows(path: str) -> Iterable[Mapping[str, Any]]:
    from datasets import Dataset

    try:
        return Dataset.from_parquet(path)
    except Exception as error:
        raise DataError(f"{path} must be a Parquet file, and cannot be read: {error}; write it again") from error


def _hub_rows(path: str, settings: DataSettings) -> Iterable[Mapping[str, Any]]:
    """A dataset of the Hub, or a local folder that `datasets` understands."""
    from datasets import load_dataset, load_from_disk

    saved = (Path(path) / "dataset_info.json").is_file()
    if saved and settings.split != "train":
        raise ConfigError(
            f"data.split is {settings.split!r}, and {path} is a folder of one split's rows; give the folder of that "
            "split as data.path, and remove split"
        )
    try:
        if saved:
            return load_from_disk(path)
        return load_dataset(path, settings.config_name, split=settings.split)
    except Exception as error:
        raise DataError(
            f"data.path must be a local file or folder or a dataset of the Hub, and {path!r} "
            f"(config_name {settings.config_name!r}, split {settings.split!r}) cannot be loaded: {error}; "
            "correct the name, or unset HF_HUB_OFFLINE if it has to be downloaded"
        ) from error


_READERS: dict[str, Callable[[str], Iterable[Mapping[str, Any]]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
