"""What a resumed run may change: each class of settings says it for its fields, and a field that differs for itself.

    class SamplingSettings(Frozen):
        on_resume = OnResume.REFUSED
        ...
    class TrainerConfig(Frozen):
        on_resume = OnResume.REFUSED
        learning_rate: Recorded[float] = Field(1e-5, gt=0)
        save_every_steps: MayChange[int | None] = None
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, TypeVar

T = TypeVar("T")


class OnResume(StrEnum):
    """What happens when a run goes on with another value of a setting."""

    MAY_CHANGE = "may change"
    """Nothing: the setting does not affect what is learnt, beyond rounding."""
    RECORDED = "recorded"
    """The run goes on; the log says so, and the run's folder and checkpoints keep both values."""
    REFUSED = "refused"
    """The run does not go on: it would be another run from here on, under the same name."""


MayChange = Annotated[T, OnResume.MAY_CHANGE]
Recorded = Annotated[T, OnResume.RECORDED]
Refused = Annotated[T, OnResume.REFUSED]
