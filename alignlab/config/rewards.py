"""Which reward functions, and how much of their failing is survived."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule
from alignlab.config.on_resume import MayChange, OnResume


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
    """A thread of the training's process, or a process of the reward's own, in which a reward that exits, crashes,
    hangs, prints or fills memory is a failed call and nothing else."""
    memory_limit_gib: MayChange[float | None] = Field(None, gt=0)
    """Of a process of its own: the memory that it may allocate. Default: 4."""

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.memory_limit_gib is not None and self.run_in == "thread":
            must = "stay null where the reward runs in a thread, which shares the training's memory"
            raise BrokenRule("memory_limit_gib", self.memory_limit_gib, must, "add run_in: process, or remove it")
        return self


class RewardLimits(Frozen):
    """What a run survives of failing rewards."""

    on_resume = OnResume.MAY_CHANGE
    time_limit_s: float = Field(30.0, gt=0)
    """For one call on a whole batch."""
    max_failures: int = Field(10, ge=0)
    """Failed calls on one rank, counted over the run and over all functions, before it stops. None is no failure. A
    function that fails at each of its first three calls ends the run whatever this says."""
