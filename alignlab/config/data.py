"""Where rows come from."""

from __future__ import annotations

import json
from typing import Any, Self

from pydantic import Field, model_validator

from alignlab.config.messages import BrokenRule
from alignlab.config.on_resume import OnResume, Recorded
from alignlab.config.render import RenderSettings

FILES = (".jsonl", ".json", ".parquet", ".csv")


class DataSettings(RenderSettings):
    """One source of rows, exactly one of `path` and `task`; and how its rows become text and tokens."""

    on_resume = OnResume.REFUSED
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

    @property
    def source(self) -> str:
        """The path or the task; the name of rows of neither."""
        return self.path or self.task or super().source

    def setting(self, name: str, value: str | bool | None = None) -> str:
        """Return how a config has one of them, with a value where one is advised."""
        text = json.dumps(value).strip('"')
        return f"data.{name}" if value is None else f"data.{name}={text}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path is not None and self.task is not None:
            raise BrokenRule("path", self.path, f"not be given beside task ({self.task!r})", "keep one of the two")
        if self.task is not None:
            self._check_task()
        else:
            self._check_no_task()
        if self.task is None and self.task_options:
            raise BrokenRule("task_options", self.task_options, "stay empty without task", "give task, or remove them")
        if self.path is not None and self.path.lower().removesuffix(".gz").endswith(FILES):
            self._check_file()
        return self

    def _check_no_task(self) -> None:
        for name in ("eval_frac", "seed"):
            value, default = getattr(self, name), type(self).model_fields[name].default
            if value != default:
                must = f"stay {default} without task, whose questions alone it divides or draws"
                raise BrokenRule(name, value, must, f"remove {name}; give held-out rows as eval_data")

    def _check_file(self) -> None:
        """Whoever names a split of a file must not get all of it, training rows among them."""
        if self.split != "train":
            fix = "give the other rows in a file of their own, and remove split"
            raise BrokenRule("split", self.split, "stay train for a file, which has no splits", fix)
        if self.config_name is not None:
            raise BrokenRule("config_name", self.config_name, "stay null for a file", "remove it")

    def _check_task(self) -> None:
        if self.split not in ("train", "eval"):
            raise BrokenRule("split", self.split, 'be "train" or "eval" for a task', "use train")
        if self.config_name is not None:
            raise BrokenRule("config_name", self.config_name, "stay null for a task", "use task_options")


class PathSettings(DataSettings):
    """The source that a program names by its path alone; messages say how it gives a setting."""

    def setting(self, name: str, value: str | bool | None = None) -> str:
        """Return how a program gives a setting beside the path, with a value where one is advised."""
        return f"DataSettings(path={self.path!r}, {name}={'...' if value is None else repr(value)})"
