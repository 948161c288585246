"""What the training of a reward model is told."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from alignlab.config.messages import BrokenRule
from alignlab.config.on_resume import Recorded
from alignlab.config.trainers.base import EvaluatedConfig


class RewardConfig(EvaluatedConfig):
    """A Bradley-Terry reward model, learnt from preferences (arXiv:2203.02155)."""

    measures = "preferences"
    type: Literal["reward"] = "reward"
    num_pairs: Recorded[int] = Field(32, ge=1)
    """Pairs a step, over all ranks."""
    centring_coef: float = Field(0.01, ge=0)
    """Weight of the squared sum of a pair's rewards, which pulls their mean to 0 (arXiv:2312.09244, whose value it is);
    0 leaves it free."""
    margin_column: str | None = None
    """Column of the dataset with how much better the chosen completion is, >= 0: it must lead by that (Llama 2,
    arXiv:2307.09288)."""
    probability_column: str | None = None
    """Column with how probably the chosen completion is the better one, in [0.5, 1]: a judge's soft label
    (arXiv:2309.00267)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        default = type(self).model_fields["logprob_chunk_tokens"].default
        if self.logprob_chunk_tokens != default:
            must = f"stay {default} for a reward model, which makes no log-probs"
            raise BrokenRule("logprob_chunk_tokens", self.logprob_chunk_tokens, must, "remove it")
        return self

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        margin = "" if self.margin_column is None else f", margin from {self.margin_column}"
        return f"reward model (Bradley-Terry, centring {self.centring_coef:g}{margin})"

    @property
    def step(self) -> str:
        """What a step is made of."""
        return f"{self.num_pairs} pairs a step"
