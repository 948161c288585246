"""Datasets as they are given to a trainer: a path, a source's settings, rows in memory, or items made already."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import DataSettings, PathSettings
from alignlab.config.render import HeldOutSettings, RenderSettings
from alignlab.data.examples import Example, examples_from_rows, load_examples
from alignlab.data.preferences import Preference, load_preferences, preferences_from_rows
from alignlab.data.prompts import load_prompts, prompts_from_rows
from alignlab.data.rows import readable_rows
from alignlab.data.unpaired import UnpairedPreference, load_unpaired, mismatch, unpaired_from_rows
from alignlab.errors import ConfigError, DataError
from alignlab.types import Prompt

Dataset = str | Path | DataSettings | Sequence[Prompt] | Iterable[Mapping[str, Any]]
_Made = TypeVar("_Made")
HELD_OUT = "eval_dataset"


@dataclass(frozen=True)
class GivenData:
    """One dataset of a trainer.

    Attributes:
        name: of the argument.
        source: the settings of the source; None for what is in memory.
        items: rows, or items made already, at least one; empty where there is a source.
        settings: how rows become text and tokens, those of the source where there is one.
    """

    name: str
    source: DataSettings | None
    items: Sequence[Any]
    settings: RenderSettings

    @property
    def skips(self) -> bool:
        """Whether rows that cannot be used are left out."""
        return self.settings.on_bad_row == "skip"

    def read(
        self, kind: type[_Made], load: Callable[[DataSettings], Sequence[_Made]],
        render: Callable[[Sequence[Any], RenderSettings], Sequence[_Made]],
    ) -> Sequence[_Made]:
        """Return the items of a source, by `load`; of rows, by `render`; or those made already, of `kind`.

        Raises:
            ConfigError, DataError: they cannot be read; of held-out data with the name.
        """
        try:
            return self._read(kind, load, render)
        except DataError as error:
            if self.name == HELD_OUT:
                raise DataError(f"{self.name}: {error}") from error
            raise

    def _read(
        self, kind: type[_Made], load: Callable[[DataSettings], Sequence[_Made]],
        render: Callable[[Sequence[Any], RenderSettings], Sequence[_Made]],
    ) -> Sequence[_Made]:
        if self.source is not None:
            return load(self.source)
        if not all(isinstance(item, kind) for item in self.items):
            return render(self.items, self.settings)
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
    dataset: Dataset | GivenData, settings: RenderSettings | None = None, *, name: str = "train_dataset",
    settings_name: str = "render_settings",
) -> GivenData:
    """Look at a dataset before anything is read of it.

    Args:
        dataset: a path or the id of a Hub dataset, settings, rows, or items made already; or what this has looked at.
        settings: of rows in memory.
        name, settings_name: of the arguments, for messages.

    Raises:
        ConfigError: it is none of these, or settings are given beside a source, which has its own.
        DataError: it holds nothing.
    """
    if isinstance(dataset, GivenData):
        return dataset
    _check_settings(settings, settings_name)
    if isinstance(dataset, str | Path):
        dataset = PathSettings(path=str(dataset))
    if isinstance(dataset, DataSettings):
        if settings is not None:
            raise ConfigError(
                f"{settings_name} is given, and is for rows in memory, where {name} is {dataset.source}; put what it "
                f"says into {name}=DataSettings(path=..., ...)"
            )
        return GivenData(name, dataset, (), dataset)
    items = _items_of(dataset, settings, name, settings_name)
    if not items:
        raise DataError(f"{name} must hold at least one row, and is empty; give rows, or the path of a dataset")
    return GivenData(name, None, items, settings or RenderSettings())


def given_held_out(
    dataset: Dataset | None, settings: RenderSettings | None, train: GivenData
) -> GivenData | None:
    """Look at held-out data; None where there is none.

    Args:
        settings: of rows in memory; default: those of the training's rows where they are in memory too, but for the
            number of rows.

    Raises:
        ConfigError, DataError: see `given_data`; or there are settings and no data.
    """
    name, settings_name = HELD_OUT, "eval_render_settings"
    if dataset is None:
        if settings is not None:
            raise ConfigError("eval_render_settings is given, and there is no eval_dataset; give both or neither")
        return None
    if settings is None and train.source is None and not isinstance(dataset, str | Path | DataSettings):
        held_out = given_data(dataset, name=name, settings_name=settings_name)
        of_rows = all(isinstance(item, Mapping) for item in held_out.items)
        return replace(held_out, settings=_named(train.settings) if of_rows else held_out.settings)
    held_out = given_data(dataset, settings, name=name, settings_name=settings_name)
    if held_out.source is not None:
        return held_out
    return replace(held_out, settings=_named(held_out.settings, size=held_out.settings.size))


def _named(settings: RenderSettings, size: int | None = None) -> HeldOutSettings:
    """Return the settings under the name that a program gives those of held-out rows."""
    return HeldOutSettings(**_shared(settings) | {"size": size})


def sampled_settings(settings: RenderSettings) -> RenderSettings:
    """How rows of completions that were sampled from prompts are rendered: as the prompts, their system prompt and
    their tools included."""
    changed = {"size": None, "prompt_column": "prompt", "taught_turns": "together"}
    return RenderSettings(**_shared(settings) | changed)


def _check_settings(settings: Any, name: str) -> None:
    if settings is None:
        return
    if not isinstance(settings, RenderSettings):
        raise ConfigError(f"{name} must be RenderSettings, and is {type(settings).__name__}; use RenderSettings(...)")
    if isinstance(settings, DataSettings) and settings != DataSettings(**_shared(settings)):
        raise ConfigError(
            f"{name} is DataSettings of {settings.source}, and must say how rows in memory are read; use "
            "RenderSettings(...)"
        )


def _shared(settings: RenderSettings) -> dict[str, Any]:
    return {name: getattr(settings, name) for name in RenderSettings.model_fields}


def _items_of(dataset: Any, settings: RenderSettings | None, name: str, settings_name: str) -> Sequence[Any]:
    """The rows of a dataset in memory, no more than are wanted.

    Raises:
        ConfigError: it is no dataset.
    """
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
    settings = settings or RenderSettings()
    if settings.size is None and _is_stream(dataset):
        raise ConfigError(
            f"{name} is a stream of unknown length ({type(dataset).__name__}); say how many rows to take, "
            f"{settings_name}=RenderSettings(size=10000), or give all of them, list(...)"
        )
    return readable_rows(dataset, settings)


def _described(dataset: Mapping[Any, Any], name: str) -> str:
    """What a mapping is instead of rows, and the fix."""
    keys = ", ".join(repr(key) for key in itertools.islice(dataset, 5))
    values = list(itertools.islice(dataset.values(), 5))
    if values and all(not isinstance(value, str) and isinstance(value, Iterable) for value in values):
        if all(isinstance(row, Mapping) for value in values for row in itertools.islice(value, 1)):
            return f"a mapping of several ({keys}); give one of them, such as {name}[{next(iter(dataset))!r}]"
        return f"a mapping of columns ({keys}); give rows, such as datasets.Dataset.from_dict(...)"
    return f"a mapping of {keys or 'nothing'}; give a list of such rows, [{{...}}]"


def _is_stream(dataset: Any) -> bool:
    """Tell a dataset that may have no end: those of `datasets` and torch that are read from the front alone."""
    return "IterableDataset" in {kind.__name__ for kind in type(dataset).__mro__}


def resolve_examples(data: GivenData, tokenizer: PreTrainedTokenizerBase) -> Sequence[Example]:
    """Supervised examples of a source, of rows as `examples_from_rows` reads them, or made already."""
    return data.read(
        Example, lambda source: load_examples(source, tokenizer),
        lambda rows, settings: examples_from_rows(rows, settings, tokenizer),
    )


def resolve_preferences(
    data: GivenData, tokenizer: PreTrainedTokenizerBase, **columns: str | None
) -> Sequence[Preference]:
    """Preferences of a source, of rows as `preferences_from_rows` reads them, or made already.

    Args:
        columns: margin_column and probability_column, see there.
    """
    return data.read(
        Preference, lambda source: load_preferences(source, tokenizer, **columns),
        lambda rows, settings: preferences_from_rows(rows, settings, tokenizer, **columns),
    )


def resolve_unpaired(data: GivenData, tokenizer: PreTrainedTokenizerBase) -> Sequence[UnpairedPreference]:
    """Unpaired preferences of a source, of rows as `unpaired_from_rows` reads them, or made already."""
    found = data.read(
        UnpairedPreference, lambda source: load_unpaired(source, tokenizer),
        lambda rows, settings: unpaired_from_rows(rows, settings, tokenizer),
    )
    return mismatch(found, data.name) if isinstance(found, list) else found


def given_prompts(dataset: Dataset | GivenData, settings: RenderSettings | None = None) -> GivenData:
    """Look at a dataset of prompts before anything is read of it; see `given_data`.

    Raises:
        ConfigError, DataError: see there; or settings of rows in memory say which turns are taught.
    """
    data = given_data(dataset, settings)
    if data.source is None and data.settings.taught_turns != "together":
        raise ConfigError(
            f"{data.settings.setting('taught_turns')} is {data.settings.taught_turns}, and is for supervised data "
            "alone: a trainer that samples its completions teaches no turn of a row; leave it out"
        )
    return data


def resolve_prompts(data: GivenData | None, tokenizer: PreTrainedTokenizerBase) -> Sequence[Prompt]:
    """Prompts of a source, of rows with TRL's `prompt` or `messages` columns, or made already; none of no data."""
    if data is None:
        return ()
    return data.read(
        Prompt, lambda source: load_prompts(source, tokenizer),
        lambda rows, settings: prompts_from_rows(rows, settings, tokenizer),
    )
