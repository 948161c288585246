"""What supervised fine-tuning is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignlab.config.on_resume import Recorded
from alignlab.config.trainers.base import EvaluatedConfig


class SFTConfig(EvaluatedConfig):
    """Supervised fine-tuning on prompt and completion; the loss is on the completion alone."""

    takes_rewards = "optional"
    measures = "likelihood"
    type: Literal["sft"] = "sft"
    num_sequences: Recorded[int] = Field(32, ge=1)
    """Examples a step, over all ranks."""

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return "sft"

    @property
    def step(self) -> str:
        """What a step is made of."""
        return f"{self.num_sequences} examples a step"
