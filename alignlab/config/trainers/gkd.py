"""What generalised knowledge distillation is told."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.messages import BrokenRule
from alignlab.config.teacher import TeacherSettings
from alignlab.config.trainers.online import OnlineConfig


class GKDConfig(OnlineConfig):
    """A student learns its teacher's distribution at each token that it samples itself (GKD, arXiv:2306.13649)."""

    takes_rewards: ClassVar[Literal["needed", "optional", "none"]] = "optional"
    type: Literal["gkd"] = "gkd"
    teacher: TeacherSettings
    group_size: int = Field(1, ge=1)
    """Completions a prompt."""
    beta: float = Field(0.5, ge=0, le=1)
    """0 is the forward KL, 1 the reverse KL, in between a Jensen-Shannon divergence; see `functional.distillation`."""
    temperature: float = Field(1.0, gt=0)
    """Of both distributions where they are compared; the loss is multiplied by its square. What the student samples at
    is `sampling.temperature`."""
    student_frac: float = Field(1.0, ge=0, le=1)
    """Of the prompts, how many the student completes (lambda); the rest have the dataset's `completion` or `answer`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.student_frac < 1 and self.group_size > 1:
            must = "be 1 with student_frac below 1: the dataset has one completion a prompt"
            raise BrokenRule("group_size", self.group_size, must, "use group_size 1 and more num_prompts")
        return self

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        """Where the student samples nothing, nothing reads what would be said of it."""
        if self.student_frac == 0 and self.mask_truncated:
            must = "be false with student_frac 0: the dataset's completions are whole"
            raise BrokenRule("mask_truncated", True, must, "remove it, or let the student sample")
        return self

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"gkd ({self.teacher.name}, beta {self.beta:g}, student_frac {self.student_frac:g})"
