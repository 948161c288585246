"""What KTO is told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignlab.config.on_resume import MayChange, Recorded
from alignlab.config.trainers.base import EvaluatedConfig


class KTOConfig(EvaluatedConfig):
    """Learning from completions that are good or bad, each by itself (KTO, arXiv:2402.01306)."""

    measures = "labels"
    type: Literal["kto"] = "kto"
    num_sequences: Recorded[int] = Field(32, ge=1)
    """Completions a step, over all ranks; the KL to the reference is estimated from as many."""
    beta: float = Field(0.1, gt=0)
    """How soon a gain or a loss saturates: the lower, the further the policy may leave the reference."""
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)
    """Of each completion's loss. Where the two kinds are not as many, weight times number should be about equal, or up
    to a third more for the desirable ones (Eq. 9)."""
    precompute_reference: MayChange[bool] = True
    """Score all completions by the reference once, before the first step, and keep that on disk for later runs; false
    scores each batch as it comes."""

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"kto (beta {self.beta:g}, weights {self.desirable_weight:g} and {self.undesirable_weight:g})"

    @property
    def step(self) -> str:
        """What a step is made of."""
        return f"{self.num_sequences} completions a step"
