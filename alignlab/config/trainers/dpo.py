"""What DPO and its family are told."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.messages import BrokenRule
from alignlab.config.trainers.base import TrainerConfig

PreferenceLoss = Literal["sigmoid", "robust", "ipo", "ipo_mean", "hinge", "simpo", "orpo"]
REFERENCE_FREE = ("simpo", "orpo")
# Fields that a preference loss does not read; a value that is not the default would be ignored in silence.
READ_BY = {"label_smoothing": ("sigmoid", "robust"), "simpo_gamma": ("simpo",)}


class DPOConfig(TrainerConfig):
    """Learning from preferences directly, without a reward model (DPO, arXiv:2305.18290, and its family)."""

    measures = "preferences"
    type: Literal["dpo"] = "dpo"
    num_pairs: int = Field(32, ge=1)
    """Pairs a step, over all ranks."""
    loss: PreferenceLoss = "sigmoid"
    """sigmoid is DPO; with label_smoothing, cDPO. ipo is of summed log-ratios, ipo_mean of means over tokens. simpo and
    orpo need no reference. See `functional.preference_losses`."""
    beta: float = Field(0.1, gt=0)
    """Strength of the KL to the reference; for simpo the scale of mean log-probs, by default 2; for orpo the weight of
    the odds ratio."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong, for sigmoid and robust."""
    simpo_gamma: float = Field(1.0, ge=0)
    """The margin that the chosen completion must lead by."""
    precompute_reference: bool = True
    """Score all pairs by the reference once, before the first step, and keep that on disk for later runs; false scores
    each batch as it comes."""
    eval_every_steps: int | None = Field(None, ge=1)
    """Evaluate during training too; before and after is always done where there is evaluation data."""

    @model_validator(mode="before")
    @classmethod
    def _fill_beta(cls, given: Any) -> Any:
        return {"beta": 2.0} | given if isinstance(given, dict) and given.get("loss") == "simpo" else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name, losses in READ_BY.items():
            default = type(self).model_fields[name].default
            if self.loss not in losses and getattr(self, name) != default:
                must = f"stay {default} with loss {self.loss}, which does not read it"
                raise BrokenRule(name, getattr(self, name), must, f"remove {name}, or use loss: {losses[-1]}")
        if self.loss == "robust" and self.label_smoothing == 0:
            must = "be above 0 with loss robust, which corrects for it"
            raise BrokenRule("label_smoothing", 0.0, must, "use 0.1, or loss: sigmoid")
        return self

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"dpo ({self.loss}, beta {self.beta:g})"

    @property
    def step(self) -> str:
        """What a step is made of."""
        return f"{self.num_pairs} pairs a step"
