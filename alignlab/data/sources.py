"""Rows of a dataset, from wherever they are: a local file, the Hub, a task's generator."""

from __future__ import annotations

from pathlib import Path

from alignlab.config.data import DataSettings
from alignlab.data.files import READERS, Rows, file_kind, file_rows
from alignlab.data.tasks import task_rows
from alignlab.errors import ConfigError, DataError
from alignlab.models.download_limits import within_download_limit


def load_rows(settings: DataSettings) -> Rows:
    """Return the rows of the source that `settings` names, before anything is done with them.

    Raises:
        ConfigError: there is no source, or it has no such split.
        DataError: it cannot be read. One row that cannot is a `DamagedRow`.
    """
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
    is_file = file_kind(settings.path) in READERS or Path(settings.path).is_file()
    return file_rows(settings.path) if is_file and not Path(settings.path).is_dir() else _hub_rows(settings)


def _hub_rows(settings: DataSettings) -> Rows:
    """Return a dataset of the Hub, or of a local folder that `datasets` understands or has saved."""
    from datasets import load_dataset

    path = str(settings.path)
    saved = [name for name in ("dataset_info.json", "dataset_dict.json") if (Path(path) / name).is_file()]
    if saved:
        return _saved_rows(path, settings)
    try:
        return within_download_limit(path, lambda: load_dataset(path, settings.config_name, split=settings.split))
    except ConfigError:
        raise
    except Exception as error:
        raise DataError(
            f"the path of the data must be a local file or folder or a dataset of the Hub, and {path!r} "
            f"(config_name {settings.config_name!r}, split {settings.split!r}) cannot be loaded: {error}; "
            "correct the name, or unset HF_HUB_OFFLINE if it has to be downloaded"
        ) from error


def _saved_rows(path: str, settings: DataSettings) -> Rows:
    """Return a split of a folder that `datasets` has saved."""
    from datasets import DatasetDict, load_from_disk

    split, setting = settings.split, settings.setting("split")

    try:
        saved = load_from_disk(path)
    except Exception as error:
        raise DataError(f"{path} must be a folder that datasets saved, and cannot be loaded: {error}") from error
    if not isinstance(saved, DatasetDict):
        if split != "train":
            raise ConfigError(
                f"{setting} is {split!r}, and {path} is a folder of one split's rows; give the folder "
                "of that split, and remove split"
            )
        return saved
    if split not in saved:
        raise ConfigError(f"{setting} is {split!r}, and {path} has {', '.join(saved)}; use one of these")
    return saved[split]
