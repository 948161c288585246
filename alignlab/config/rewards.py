"""Which reward functions, and how much of their failing is survived."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from alignlab.config.base import Frozen
from alignlab.config.on_resume import OnResume


class RewardSettings(Frozen):
    """One reward function."""

    on_resume = OnResume.REFUSED
    name: str
    """An installed plug-in's name, the local folder of a reward model, `package.module.function`, or
    `file.py:function`."""
    weight: float = 1.0
    options: dict[str, Any] = {}
    """Keyword arguments, passed on every call."""


class RewardLimits(Frozen):
    """What a run survives of failing rewards."""

    on_resume = OnResume.MAY_CHANGE
    time_limit_s: float = Field(30.0, gt=0)
    """For one call on a whole batch."""
    max_failures: int = Field(10, ge=0)
    """Failed calls on one rank, counted over the run and over all functions, before it stops. None is no failure. A
    function that fails at each of its first three calls ends the run whatever this says."""
