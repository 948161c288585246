"""Where prompts come from and what is done with rows that cannot be used."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule

FILES = (".jsonl", ".json", ".parquet", ".csv")


class DataSettings(Frozen):
    """One source of prompts: exactly one of `path` and `task`."""

    path: str | None = None
    """A Hub dataset id, or a local .jsonl, .json, .parquet or .csv file."""
    task: str | None = None
    """A reasoning_gym task, such as chain_sum."""
    task_options: dict[str, Any] = {}
    """Arguments of the task's generator."""
    config_name: str | None = None
    """A Hub dataset's configuration."""
    split: str = "train"
    """A Hub dataset's split. For a task: "train" or "eval", disjoint by question."""
    size: int | None = Field(None, ge=1)
    """Rows to take; default all (for a task, 1000)."""
    eval_frac: float = Field(0.2, gt=0, lt=1)
    """For a task: the fraction of distinct questions that belongs to the split "eval"."""
    seed: int = 0
    """For a task: seed of its generator."""
    prompt_column: str = "prompt"
    """A string, or a list of chat messages."""
    system_prompt: str | None = None
    prompt_template: str | None = None
    """Text with `{prompt}` in it, put around a plain prompt."""
    chat: bool | None = None
    """Render through the tokenizer's chat template; default: where the tokenizer has one."""
    max_prompt_tokens: int = Field(1024, ge=1)
    on_bad_row: Literal["error", "skip"] = "error"
    """Bad rows, over-long prompts, and examples that the model has no positions for: stop with the number, or skip and
    count."""

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
        if self.path is not None and self.path.lower().endswith(FILES):
            self._check_file()
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            raise BrokenRule("prompt_template", self.prompt_template, "contain {prompt}", "put it in")
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
