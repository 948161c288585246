"""What DPO and its family are told."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from alignlab.config.messages import BrokenRule
from alignlab.config.on_resume import MayChange, Recorded
from alignlab.config.trainers.base import EvaluatedConfig
from alignlab.config.trainers.pairs import PairLossConfig


class DPOConfig(PairLossConfig, EvaluatedConfig):
    """Learning from preferences directly, without a reward model (DPO, arXiv:2305.18290, and its family)."""

    measures = "preferences"
    type: Literal["dpo"] = "dpo"
    num_pairs: Recorded[int] = Field(32, ge=1)
    """Pairs a step, over all ranks."""
    precompute_reference: MayChange[bool] = True
    """Score all pairs by the reference once, before the first step, and keep that on disk for later runs; false scores
    each batch as it comes."""
    probability_column: str | None = None
    """Column with how probably the chosen completion is the better one, in [0.5, 1]: a judge's soft label
    (arXiv:2309.00267), for loss sigmoid."""

    @model_validator(mode="after")
    def _check_probabilities(self) -> Self:
        if self.probability_column is None:
            return self
        if self.loss != "sigmoid":
            must = f"be null with loss {self.loss}, which takes labels for certain"
            raise BrokenRule("probability_column", self.probability_column, must, "remove it, or use loss: sigmoid")
        if self.label_smoothing:
            must = "be 0 with probability_column, which says how sure each label is"
            raise BrokenRule("label_smoothing", self.label_smoothing, must, "keep one of the two")
        return self

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"dpo ({self.loss}, beta {self.beta:g})"

    @property
    def step(self) -> str:
        """What a step is made of."""
        return f"{self.num_pairs} pairs a step"
