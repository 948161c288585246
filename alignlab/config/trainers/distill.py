"""What offline distillation is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignlab.config.on_resume import Recorded
from alignlab.config.teacher import TeacherSettings
from alignlab.config.trainers.base import TrainerConfig


class DistillConfig(TrainerConfig):
    """A student learns its teacher's distribution at each token of given completions (arXiv:1503.02531)."""

    takes_rewards = "optional"
    measures = "accuracy"
    type: Literal["distill"] = "distill"
    teacher: TeacherSettings
    num_sequences: Recorded[int] = Field(32, ge=1)
    """Examples a step, over all ranks."""
    beta: float = Field(0.0, ge=0, le=1)
    """0 is the forward KL, 1 the reverse KL, in between a Jensen-Shannon divergence; see `functional.distillation`."""
    temperature: float = Field(1.0, gt=0)
    """Of both distributions; the loss is multiplied by its square, so that its gradient keeps its size."""
    hard_label_weight: float = Field(0.0, ge=0, lt=1)
    """Of the cross-entropy of the completions themselves; the divergence weighs the rest."""
    top_k: int | None = Field(None, ge=1)
    """The teacher's likeliest tokens that are kept on disk, with the rest as one: each example is asked about once,
    for this and later runs. None asks for whole distributions at each step, and keeps nothing."""

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        kept = "whole distributions" if self.top_k is None else f"top {self.top_k}"
        return f"distill ({self.teacher.name}, beta {self.beta:g}, {kept})"

    @property
    def step(self) -> str:
        """What a step is made of."""
        return f"{self.num_sequences} examples a step"
