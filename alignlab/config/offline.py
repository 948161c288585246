"""Trainers that learn from a fixed dataset: SFT, DPO and its family, KTO, and reward models."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.averaging import AveragedConfig
from alignlab.config.base import Frozen, MayChange, OnResume, Recorded
from alignlab.config.error_messages import BrokenRule

PreferenceLoss = Literal["sigmoid", "robust", "ipo", "ipo_mean", "hinge", "simpo", "orpo"]
REFERENCE_FREE = ("simpo", "orpo")
# Fields that some preference losses alone read.
READ_BY = {"label_smoothing": ("sigmoid", "robust"), "simpo_gamma": ("simpo",)}


class SFTConfig(AveragedConfig):
    """Supervised fine-tuning on prompt and completion; the loss is on the completion alone."""

    takes_rewards = "optional"
    measures = "likelihood"
    type: Literal["sft"] = "sft"
    num_sequences: Recorded[int] = Field(32, ge=1)
    """Examples a step, over all ranks."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Part of each label that is spread evenly over the vocabulary (arXiv:1512.00567); 0.1 is usual. Held-out loss is
    of labels as they are."""
    z_loss_coef: float = Field(0.0, ge=0)
    """Weight of the squared log of the softmax's denominator (arXiv:2204.02311), which keeps the logits from drifting
    away; 1e-4 is usual."""

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        options = {"label smoothing": self.label_smoothing, "z-loss": self.z_loss_coef}
        given = ", ".join(f"{name} {value:g}" for name, value in options.items() if value)
        return f"sft ({given})" if given else "sft"

    @property
    def step(self) -> str:
        """Short description of a step's size, for reports."""
        return f"{self.num_sequences} examples a step"


class PairLossConfig(Frozen):
    """The loss of a pair of completions: DPO (arXiv:2305.18290) and its family. Fields for trainers of pairs."""

    on_resume = OnResume.REFUSED
    loss: PreferenceLoss = "sigmoid"
    """sigmoid is DPO; with label_smoothing, cDPO. ipo is of summed log-ratios, ipo_mean of means over tokens. simpo and
    orpo need no reference. See `functional.preference_losses`."""
    beta: float = Field(0.1, gt=0)
    """Strength of the KL to the reference; for simpo the scale of mean log-probs, by default 2; for orpo the weight of
    the odds ratio."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """Probability that a label is wrong, for sigmoid and robust."""
    simpo_gamma: float = Field(1.0, ge=0)
    """Margin by which the chosen completion must lead, for simpo."""

    @model_validator(mode="before")
    @classmethod
    def _fill_beta(cls, raw: Any) -> Any:
        return {"beta": 2.0} | raw if isinstance(raw, dict) and raw.get("loss") == "simpo" else raw

    @model_validator(mode="after")
    def _check_pair_loss(self) -> Self:
        for name, losses in READ_BY.items():
            if self.loss not in losses:
                because = f"with loss {self.loss}, which does not read it"
                self.refuse_unread(name, because, f"remove {name}, or use loss: {losses[-1]}")
        if self.loss == "robust" and self.label_smoothing == 0:
            must = "be above 0 with loss robust, which corrects for it"
            raise BrokenRule("label_smoothing", 0.0, must, "use 0.1, or loss: sigmoid")
        return self

    @property
    def needs_reference(self) -> bool:
        """True if the loss is of log-ratios to a reference."""
        return self.loss not in REFERENCE_FREE


class DPOConfig(PairLossConfig, AveragedConfig):
    """Learning from preferences directly, without a reward model (DPO, arXiv:2305.18290, and its family)."""

    measures = "preferences"
    type: Literal["dpo"] = "dpo"
    num_pairs: Recorded[int] = Field(32, ge=1)
    """Pairs a step, over all ranks."""
    precompute_reference: MayChange[bool] = True
    """Compute the reference's log-probs of all pairs once, before the first step, and keep them on disk for later runs;
    false computes them for each batch."""
    probability_column: str | None = None
    """Column with the probability that the chosen completion is the better one, in [0.5, 1]: a judge's soft label
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
        """Short description of the method, for reports."""
        return f"dpo ({self.loss}, beta {self.beta:g})"

    @property
    def step(self) -> str:
        """Short description of a step's size, for reports."""
        return f"{self.num_pairs} pairs a step"


class KTOConfig(AveragedConfig):
    """Learning from single completions that are labelled good or bad (KTO, arXiv:2402.01306)."""

    measures = "labels"
    type: Literal["kto"] = "kto"
    num_sequences: Recorded[int] = Field(32, ge=1)
    """Completions a step, over all ranks; the KL to the reference is estimated from as many."""
    beta: float = Field(0.1, gt=0)
    """How soon a gain or a loss saturates: the lower, the further the policy may leave the reference."""
    desirable_weight: float = Field(1.0, gt=0)
    undesirable_weight: float = Field(1.0, gt=0)
    """Weight of each undesirable completion's loss. Where the two kinds are not as many, weight times number should be
    about equal, or up to a third more for the desirable ones (Eq. 9)."""
    precompute_reference: MayChange[bool] = True
    """Compute the reference's log-probs of all completions once, before the first step, and keep them on disk for later
    runs; false computes them for each batch."""

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        return f"kto (beta {self.beta:g}, weights {self.desirable_weight:g} and {self.undesirable_weight:g})"

    @property
    def step(self) -> str:
        """Short description of a step's size, for reports."""
        return f"{self.num_sequences} completions a step"


class RewardConfig(AveragedConfig):
    """A Bradley-Terry reward model, learnt from preferences (arXiv:2203.02155)."""

    measures = "preferences"
    type: Literal["reward"] = "reward"
    num_pairs: Recorded[int] = Field(32, ge=1)
    """Pairs a step, over all ranks."""
    centring_coef: float = Field(0.01, ge=0)
    """Weight of the squared sum of a pair's rewards, which pulls their mean to 0 (arXiv:2312.09244, whose value it is);
    0 leaves it free."""
    margin_column: str | None = None
    """Column with the margin (>= 0) by which the reward of the chosen completion must lead (Llama 2,
    arXiv:2307.09288)."""
    probability_column: str | None = None
    """Column with the probability that the chosen completion is the better one, in [0.5, 1]: a judge's soft label
    (arXiv:2309.00267)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.refuse_unread("memory.logprob_chunk_tokens", "for a reward model, which makes no log-probs")
        return self

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        margin = "" if self.margin_column is None else f", margin from {self.margin_column}"
        return f"reward model (Bradley-Terry, centring {self.centring_coef:g}{margin})"

    @property
    def step(self) -> str:
        """Short description of a step's size, for reports."""
        return f"{self.num_pairs} pairs a step"
