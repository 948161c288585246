"""What DPO and its family are told."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from alignlab.config.trainers.pairs import PairLossConfig


class DPOConfig(PairLossConfig):
    """Learning from preferences directly, without a reward model (DPO, arXiv:2305.18290, and its family)."""

    measures = "preferences"
    type: Literal["dpo"] = "dpo"
    num_pairs: int = Field(32, ge=1)
    """Pairs a step, over all ranks."""
    precompute_reference: bool = True
    """Score all pairs by the reference once, before the first step, and keep that on disk for later runs; false scores
    each batch as it comes."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Evaluate during training too; before and after is always done where there is evaluation data."""

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"dpo ({self.loss}, beta {self.beta:g})"

    @property
    def step(self) -> str:
        """What a step is made of."""
        return f"{self.num_pairs} pairs a step"
