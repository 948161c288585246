"""Reward functions, and how many of their failures a run survives."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen, MayChange, OnResume, at_home


class RewardSettings(Frozen):
    """One reward function."""

    on_resume = OnResume.REFUSED
    name: str
    """An installed plug-in's name, the local folder of a reward model, `package.module.function`, or
    `file.py:function`."""
    weight: float = 1.0
    options: dict[str, Any] = {}
    """Keyword arguments, passed on every call."""
    run_in: MayChange[Literal["thread", "process"]] = "thread"
    """A thread of the training's process; or a separate process, in which a reward that exits, crashes, hangs, prints
    or fills memory costs one failed call only."""
    memory_limit_gib: MayChange[float | None] = Field(None, gt=0)
    """Memory that a separate process may allocate. Default: 4."""

    _at_home = field_validator("name")(at_home)

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.run_in == "thread":
            because = "where the reward runs in a thread, which shares the training's memory"
            self.refuse_unread("memory_limit_gib", because, "add run_in: process, or remove it")
        return self


class RewardLimits(Frozen):
    """Limits of failing rewards."""

    on_resume = OnResume.MAY_CHANGE
    time_limit_s: float = Field(30.0, gt=0)
    """Time limit of one call on a whole batch."""
    max_failures: int = Field(10, ge=0)
    """Failed calls on one rank, counted over the run and over all functions, before the run stops. A reward of None is
    no failure. A function that fails at each of its first three calls ends the run in any case."""
