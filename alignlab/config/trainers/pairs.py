"""What every trainer is told that learns from pairs of completions."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.messages import BrokenRule
from alignlab.config.trainers.base import TrainerConfig

PreferenceLoss = Literal["sigmoid", "robust", "ipo", "ipo_mean", "hinge", "simpo", "orpo"]
REFERENCE_FREE = ("simpo", "orpo")
# Fields that a preference loss does not read; a value that is not the default would be ignored in silence.
READ_BY = {"label_smoothing": ("sigmoid", "robust"), "simpo_gamma": ("simpo",)}


class PairLossConfig(TrainerConfig):
    """The loss of a pair: DPO (arXiv:2305.18290) and its family."""

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

    @model_validator(mode="before")
    @classmethod
    def _fill_beta(cls, given: Any) -> Any:
        return {"beta": 2.0} | given if isinstance(given, dict) and given.get("loss") == "simpo" else given

    @model_validator(mode="after")
    def _check_pair_loss(self) -> Self:
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
    def needs_reference(self) -> bool:
        """Whether the loss is of log-ratios to a reference."""
        return self.loss not in REFERENCE_FREE
