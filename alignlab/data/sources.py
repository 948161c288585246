"""Rows of a source: a local file or folder, a dataset of the Hub, or a task's generator."""

from __future__ import annotations

from pathlib import Path

from alignlab.config.data import DataSettings
from alignlab.data.arrow_limits import check_arrow_files
from alignlab.data.files import READERS, Rows, file_kind, file_rows
from alignlab.data.tasks import task_rows
from alignlab.errors import ConfigError, DataError
from alignlab.models.hub.download_limits import within_download_limit


def load_rows(settings: DataSettings) -> Rows:
    """Return the unprocessed rows of a source.

    Raises:
        ConfigError: no source is named, or it has no such split.
        DataError: the source cannot be read. A single damaged row is a `DamagedRow` instead.
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
    """Return the rows of a dataset of the Hub, or of a local folder that `datasets` can load."""
    path = str(settings.path)
    saved = [name for name in ("dataset_info.json", "dataset_dict.json") if (Path(path) / name).is_file()]
    if saved:
        return _saved_rows(path, settings)
    try:
        return within_download_limit(path, lambda: _prepared_rows(path, settings.config_name, settings.split))
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise DataError(
            f"the path of the data must be a local file or folder or a dataset of the Hub, and {path!r} "
            f"(config_name {settings.config_name!r}, split {settings.split!r}) cannot be loaded: {error}; "
            "correct the name, or unset HF_HUB_OFFLINE if it has to be downloaded"
        ) from error


def _prepared_rows(path: str, config_name: str | None, split: str) -> Rows:
    """Return the rows that `datasets.load_dataset` would return; each file is checked before it is read."""
    from datasets import DownloadConfig, load_dataset_builder

    from alignlab.data.packed_files import BoundedDownloads

    builder = load_dataset_builder(path, config_name)
    config = DownloadConfig(
        cache_dir=builder._cache_downloaded_dir, use_etag=False, token=builder.token,
        storage_options=builder.storage_options,
    )
    manager = BoundedDownloads(
        builder.dataset_name, data_dir=builder.config.data_dir, download_config=config, base_path=builder.base_path
    )
    builder.download_and_prepare(dl_manager=manager)
    rows: Rows = builder.as_dataset(split=split)
    return rows


def _saved_rows(path: str, settings: DataSettings) -> Rows:
    """Return a split of a folder that `datasets` has saved."""
    from datasets import DatasetDict, load_from_disk

    split, setting = settings.split, settings.setting("split")

    try:
        check_arrow_files(Path(path))
        saved = load_from_disk(path)
    except DataError:
        raise
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
