"""Datasets as a user passes them to a trainer: a path, settings of a source, rows in memory, or prepared items."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import GIVEN_ROWS, HELD_OUT_ROWS, DataSettings, RenderSettings, settings_of_path
from alignlab.data.examples import Example, examples_from_rows
from alignlab.data.preferences import Preference, preference_rows, preferences_from_rows
from alignlab.data.prompts import prompts_from_rows
from alignlab.data.rows import readable_rows
from alignlab.data.sources import load_rows
from alignlab.data.unpaired import UnpairedPreference, mismatch, unpaired_from_rows
from alignlab.errors import ConfigError, DataError
from alignlab.types import Prompt

DatasetLike = str | Path | DataSettings | Sequence[Prompt] | Iterable[Mapping[str, Any]]
_Item = TypeVar("_Item")
HELD_OUT = "eval_dataset"


@dataclass(frozen=True)
class GivenData:
    """One dataset that a user has passed to a trainer, with nothing read of a source yet.

    Attributes:
        name: name of the trainer's argument.
        source: settings of the source; None for rows or items in memory.
        items: rows, or prepared items such as `Example`, at least one; empty where there is a source.
        settings: turn rows into text and tokens; the source's own where there is one.
    """

    name: str
    source: DataSettings | None
    items: Sequence[Any]
    settings: RenderSettings

    @property
    def skips(self) -> bool:
        """Return whether unusable rows are left out."""
        return self.settings.on_bad_row == "skip"

    def read(
        self, kind: type[_Item], make: Callable[[Iterable[Any], RenderSettings], Sequence[_Item]],
        load: Callable[[DataSettings], Iterable[Any]] = load_rows,
    ) -> Sequence[_Item]:
        """Return the items that `make` makes of rows in memory or of a source; or prepared items of `kind` unchanged.

        Args:
            load: reads the rows of a source.

        Raises:
            ConfigError, DataError: the rows cannot be read; the message says so where they are the held-out data.
        """
        try:
            return self._read(kind, make, load)
        except DataError as error:
            if self.name == HELD_OUT:
                raise DataError(f"{self.name}: {error}") from error
            raise

    def _read(
        self, kind: type[_Item], make: Callable[[Iterable[Any], RenderSettings], Sequence[_Item]],
        load: Callable[[DataSettings], Iterable[Any]],
    ) -> Sequence[_Item]:
        if self.source is not None:
            return make(load(self.source), self.settings)
        if not all(isinstance(item, kind) for item in self.items):
            return make(self.items, self.settings)
        unread = [name for name in _OF_TEXT if getattr(self.settings, name) != getattr(RenderSettings(), name)]
        if unread:
            raise ConfigError(
                f"render_settings has {unread[0]}, and {self.name} holds items of {kind.__name__}, which are tokens "
                "already; give rows instead, or leave the setting out"
            )
        return self.items


_OF_TEXT = tuple(name for name in RenderSettings.model_fields if name not in ("size", "on_bad_row"))
"""Settings that change the tokens of a row."""


def given_data(
    dataset: DatasetLike | GivenData, settings: RenderSettings | None = None, *, name: str = "train_dataset",
    settings_name: str = "render_settings",
) -> GivenData:
    """Check the kind of a dataset, before rows are read from a source.

    Args:
        dataset: a path or the id of a Hub dataset, settings, rows, or prepared items; or an earlier result of this.
        settings: of rows in memory.
        name, settings_name: names of the two arguments, for messages.

    Raises:
        ConfigError: the dataset is none of these, or settings come with a source, which has its own.
        DataError: the dataset is empty.
    """
    if isinstance(dataset, GivenData):
        return dataset
    _check_settings(settings, settings_name)
    if isinstance(dataset, str | Path):
        dataset = settings_of_path(str(dataset))
    if isinstance(dataset, DataSettings):
        if settings is not None:
            raise ConfigError(
                f"{settings_name} is given, and is for rows in memory, where {name} is {dataset.source}; put its "
                f"fields into {name}=DataSettings(path=..., ...)"
            )
        return GivenData(name, dataset, (), dataset.rendering)
    items = _items_of(dataset, settings, name, settings_name)
    if not items:
        raise DataError(f"{name} must hold at least one row, and is empty; give rows, or the path of a dataset")
    return GivenData(name, None, items, settings or RenderSettings())


def given_held_out(
    dataset: DatasetLike | None, settings: RenderSettings | None, train: GivenData
) -> GivenData | None:
    """Check the kind of the held-out data, as `given_data` does; return None without any.

    Args:
        settings: of rows in memory; default: the settings of the training rows where these are in memory too, all but
            `size`.

    Raises:
        ConfigError, DataError: see `given_data`; or there are settings without data.
    """
    name, settings_name = HELD_OUT, "eval_render_settings"
    if dataset is None:
        if settings is not None:
            raise ConfigError("eval_render_settings is given, and there is no eval_dataset; give both or neither")
        return None
    if settings is None and train.source is None and not isinstance(dataset, str | Path | DataSettings):
        held_out = given_data(dataset, name=name, settings_name=settings_name)
        of_rows = all(isinstance(item, Mapping) for item in held_out.items)
        as_in_training = train.settings.model_copy(update={"size": None}).named(HELD_OUT_ROWS)
        return replace(held_out, settings=as_in_training if of_rows else held_out.settings)
    held_out = given_data(dataset, settings, name=name, settings_name=settings_name)
    if held_out.source is not None:
        return held_out
    return replace(held_out, settings=held_out.settings.named(HELD_OUT_ROWS))


def sampled_settings(settings: RenderSettings) -> RenderSettings:
    """Return the settings that render rows of sampled completions as their prompts were rendered, with the same system
    prompt and tools."""
    changes = {"size": None, "prompt_column": "prompt", "taught_turns": "together"}
    return settings.model_copy(update=changes).named(GIVEN_ROWS)


def _check_settings(settings: Any, name: str) -> None:
    if settings is None:
        return
    if not isinstance(settings, RenderSettings):
        raise ConfigError(f"{name} must be RenderSettings, and is {type(settings).__name__}; use RenderSettings(...)")


def _items_of(dataset: Any, settings: RenderSettings | None, name: str, settings_name: str) -> Sequence[Any]:
    """Return the rows of a dataset in memory, at most `settings.size`.

    Raises:
        ConfigError: the argument is no dataset.
    """
    _check_is_rows(dataset, name)
    settings = settings or RenderSettings()
    if settings.size is None and _is_stream(dataset):
        raise ConfigError(
            f"{name} is a stream of unknown length ({type(dataset).__name__}); say how many rows to take, "
            f"{settings_name}=RenderSettings(size=10000), or give all of them, list(...)"
        )
    return readable_rows(dataset, settings)


def _check_is_rows(dataset: Any, name: str) -> None:
    if dataset is None:
        raise ConfigError(f"{name} is None, and must be a dataset; give rows, a path or DataSettings")
    if isinstance(dataset, Mapping):
        raise ConfigError(f"{name} must be one dataset, and is {_described(dataset, name)}")
    if hasattr(dataset, "to_dict") and hasattr(dataset, "itertuples"):
        raise ConfigError(f"{name} must be rows, and is a table of pandas; give {name}.to_dict('records')")
    if (not isinstance(dataset, Iterable) and not hasattr(dataset, "__getitem__")) or isinstance(dataset, bytes):
        raise ConfigError(
            f"{name} must be rows, a path or DataSettings, and is {type(dataset).__name__}; give a list of dicts"
        )


def _described(dataset: Mapping[Any, Any], name: str) -> str:
    """Describe a mapping that is given in place of rows, with the fix."""
    keys = ", ".join(repr(key) for key in itertools.islice(dataset, 5))
    values = list(itertools.islice(dataset.values(), 5))
    has_columns = bool(values) and all(not isinstance(value, str) and isinstance(value, Iterable) for value in values)
    if has_columns:
        if all(isinstance(row, Mapping) for value in values for row in itertools.islice(value, 1)):
            return f"a mapping of several ({keys}); give one of them, such as {name}[{next(iter(dataset))!r}]"
        return f"a mapping of columns ({keys}); give rows, such as datasets.Dataset.from_dict(...)"
    return f"a mapping of {keys or 'nothing'}; give a list of such rows, [{{...}}]"


def _is_stream(dataset: Any) -> bool:
    """Return whether a dataset of `datasets` or torch can only be read from the front, so that it may have no end."""
    return "IterableDataset" in {kind.__name__ for kind in type(dataset).__mro__}


def resolve_examples(data: GivenData, tokenizer: PreTrainedTokenizerBase) -> Sequence[Example]:
    """Return supervised examples, made of rows by `examples_from_rows` or prepared by the caller."""
    return data.read(Example, lambda rows, settings: examples_from_rows(rows, settings, tokenizer))


def resolve_preferences(
    data: GivenData, tokenizer: PreTrainedTokenizerBase, **columns: str | None
) -> Sequence[Preference]:
    """Return preferences, made of rows by `preferences_from_rows` or prepared by the caller.

    Args:
        columns: margin_column and probability_column of `preferences_from_rows`.
    """
    return data.read(
        Preference, lambda rows, settings: preferences_from_rows(rows, settings, tokenizer, **columns),
        load=preference_rows,
    )


def resolve_unpaired(data: GivenData, tokenizer: PreTrainedTokenizerBase) -> Sequence[UnpairedPreference]:
    """Return unpaired preferences, made of rows by `unpaired_from_rows` or prepared by the caller."""
    preferences = data.read(
        UnpairedPreference, lambda rows, settings: unpaired_from_rows(rows, settings, tokenizer), load=preference_rows
    )
    return mismatch(preferences, data.name) if isinstance(preferences, list) else preferences


def given_prompts(dataset: DatasetLike | GivenData, settings: RenderSettings | None = None) -> GivenData:
    """Check the kind of a dataset of prompts; see `given_data`.

    Raises:
        ConfigError, DataError: see `given_data`; or settings of rows in memory choose the turns to train on.
    """
    data = given_data(dataset, settings)
    if data.source is None and data.settings.taught_turns != "together":
        raise ConfigError(
            f"{data.settings.setting('taught_turns')} is {data.settings.taught_turns}, and is for supervised data "
            "alone: a trainer that samples its completions trains on no turn of a row; leave it out"
        )
    return data


def resolve_prompts(data: GivenData | None, tokenizer: PreTrainedTokenizerBase) -> Sequence[Prompt]:
    """Return prompts, made of rows by `prompts_from_rows` or prepared by the caller; none without data."""
    if data is None:
        return ()
    return data.read(Prompt, lambda rows, settings: prompts_from_rows(rows, settings, tokenizer))
