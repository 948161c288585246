"""Sources of rows (`DataSettings`), and the rendering of rows into text and tokens (`RenderSettings`)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from typing import Any, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from alignlab.config.base import Frozen, MayChange, OnResume, Recorded, at_home
from alignlab.config.error_messages import BrokenRule

FILES = (".jsonl", ".json", ".parquet", ".csv")
Value = str | bool | None


@dataclass(frozen=True)
class SettingNames:
    """Names of settings as their user writes them: keys of a config's section, arguments in Python, or flags.

    Attributes:
        source: name of the rows.
        write: from a setting's name and an advised value, or None for no value, to what the user writes.
    """

    source: str
    write: Callable[[str, Value], str]


def argument_names(argument: str, section: str) -> SettingNames:
    """Return the names of settings that a program passes as RenderSettings.

    Args:
        argument: keyword of the function or class that takes them.
        section: name of the settings where no value is advised.
    """

    def write(name: str, value: Value) -> str:
        return f"{section}.{name}" if value is None else f"{argument}=RenderSettings({name}={value!r})"

    return SettingNames("the given rows", write)


GIVEN_ROWS = argument_names("render_settings", "RenderSettings")
HELD_OUT_ROWS = argument_names("eval_render_settings", "eval_render_settings")


class _RowSettings(Frozen):
    """Fields of rows in memory and of rows from a source alike."""

    on_resume = OnResume.REFUSED
    size: int | None = Field(None, ge=1)
    """Rows to take; default all (for a task, 1000)."""
    prompt_column: str = "prompt"
    """A string, or a list of chat messages: OpenAI's or ShareGPT's, also as the text that a table has for it."""
    system_prompt: str | None = None
    prompt_template: str | None = None
    """Text with `{prompt}` in it, put around a plain prompt."""
    chat: bool | None = None
    """Render through the tokenizer's chat template; default: where the tokenizer has one."""
    max_prompt_tokens: int = Field(1024, ge=1)
    tools: tuple[dict[str, Any], ...] = ()
    """Tools for the chat template, as JSON schemas; a row's column `tools` has precedence."""
    chat_template_kwargs: dict[str, Any] = {}
    """Variables of the chat template, such as {enable_thinking: false}; those of a row's column of this name have
    precedence."""
    template_date: date = date(2024, 7, 26)
    """The day that a chat template takes for today: a fixed one, so that a run can be resumed on another day."""
    escape_special_tokens: bool = False
    """Encode special tokens that a row's texts spell, such as <|im_end|>, as text; the template's own stay special."""
    taught_turns: Literal["together", "separately", "last"] = "together"
    """Of a conversation in supervised data: teach all of the assistant's turns in one example, each in a separate
    example with the history as the template writes it there, or the last one alone."""
    on_bad_row: MayChange[Literal["error", "skip"]] = "error"
    """Bad rows, over-long prompts, and examples that the model has no positions for: stop with the number, or skip and
    count."""
    _names: SettingNames | None = PrivateAttr(None)

    @property
    def names(self) -> SettingNames:
        """Names of the settings in messages."""
        return self._names or GIVEN_ROWS

    @property
    def source(self) -> str:
        """Name of the rows in messages."""
        return self.names.source

    def named(self, names: SettingNames) -> Self:
        """Return the settings with other names in messages."""
        settings = self.model_copy()
        settings._names = names
        return settings

    def setting(self, name: str, value: Value = None) -> str:
        """Return how the user writes a setting, with the value that a message advises, if any."""
        return self.names.write(name, value)

    @model_validator(mode="after")
    def _check_template(self) -> Self:
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise BrokenRule("prompt_template", self.prompt_template, "contain {prompt}", "put it in")
        return self


class RenderSettings(_RowSettings):
    """Rendering of rows into text and tokens."""


class DataSettings(_RowSettings):
    """One source of rows, exactly one of `path` and `task`, and the rendering of its rows."""

    path: Recorded[str | None] = None
    """A Hub dataset id, a local .jsonl, .json, .parquet or .csv file (all but Parquet also with .gz), or a folder."""
    task: str | None = None
    """A reasoning_gym task, such as chain_sum."""
    task_options: dict[str, Any] = {}
    """Arguments of the task's generator."""
    config_name: str | None = None
    """A Hub dataset's configuration."""
    split: str = "train"
    """A Hub dataset's split. For a task: "train" or "eval", disjoint by question."""
    eval_frac: float = Field(0.2, gt=0, lt=1)
    """For a task: the fraction of distinct questions that belongs to the split "eval"."""
    seed: int = 0
    """For a task: seed of its generator."""

    _at_home = field_validator("path")(at_home)

    @property
    def names(self) -> SettingNames:
        """Names of the settings in messages: keys of the section `data`, unless `named` has set others."""
        return self._names or SettingNames(self.path or self.task or GIVEN_ROWS.source, _write_in_section)

    @property
    def rendering(self) -> RenderSettings:
        """Settings by which the rows become text and tokens."""
        fields = {name: getattr(self, name) for name in RenderSettings.model_fields}
        return RenderSettings(**fields).named(self.names)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path is not None and self.task is not None:
            raise BrokenRule("path", self.path, f"not be given beside task ({self.task!r})", "keep one of the two")
        if self.task is None:
            self._check_no_task()
        else:
            self._check_task()
        if self.path is not None and self.path.lower().removesuffix(".gz").endswith(FILES):
            self._check_file()
        return self

    def _check_no_task(self) -> None:
        for name in ("eval_frac", "seed"):
            because = "without task, whose questions alone it divides or draws"
            self.refuse_unread(name, because, f"remove {name}; give held-out rows as eval_data")
        self.refuse_unread("task_options", "without task", "give task, or remove them")

    def _check_file(self) -> None:
        """Refuse a split of a file: the whole file would be read, training rows among them."""
        fix = "give the other rows in a separate file, and remove split"
        self.refuse_unread("split", "for a file, which has no splits", fix)
        self.refuse_unread("config_name", "for a file", "remove it")

    def _check_task(self) -> None:
        if self.split not in ("train", "eval"):
            raise BrokenRule("split", self.split, 'be "train" or "eval" for a task', "use train")
        self.refuse_unread("config_name", "for a task", "use task_options")


def _write_in_section(name: str, value: Value) -> str:
    text = json.dumps(value).strip('"')
    return f"data.{name}" if value is None else f"data.{name}={text}"


def settings_of_path(path: str) -> DataSettings:
    """Return the settings of a source that a program names by its path alone."""

    def write(name: str, value: Value) -> str:
        return f"DataSettings(path={path!r}, {name}={'...' if value is None else repr(value)})"

    return DataSettings(path=path).named(SettingNames(path, write))
