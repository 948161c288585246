"""What every trainer is told that learns from its own rollouts, and those among them that follow a policy gradient."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule
from alignlab.config.on_resume import MayChange, OnResume, Recorded
from alignlab.config.online_rules import ONLINE_RULES, POLICY_GRADIENT_RULES
from alignlab.config.peer_names import TRL_CORRECTIONS
from alignlab.config.rewards import RewardLimits
from alignlab.config.rollout import RolloutEngineSettings, RolloutSettings, SamplingSettings, fill_engine
from alignlab.config.trainers.base import EvaluatedConfig

MISMATCH_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "token_tis": (None, 2.0), "icepop": (0.5, 5.0), "token_mask": (0.5, 5.0),
    "sequence_tis": (None, 2.0), "sequence_mis": (0.5, 2.0), "sequence_mask": (0.5, 2.0),
    "geometric_mis": (0.95, 1.05), "geometric_mask": (0.95, 1.05),
}  # fmt: skip


class KLSettings(Frozen):
    """KL to the reference. Estimators: Schulman, "Approximating KL Divergence" (2020)."""

    on_resume = OnResume.REFUSED
    coef: float = Field(0.0, ge=0)
    """0: the KL is not priced; `measure_every_steps` may still show it."""
    placement: Literal["loss", "reward"] = "loss"
    """In the reward: with a critic, and with advantages of tokens (REINFORCE++), each token pays for the KL from itself
    to the end; with other advantages a completion pays for all of its KL, as one action."""
    estimator: Literal["k1", "k2", "k3"] = "k2"
    """In the loss: all three have the KL's gradient, see `kl_loss`, and differ in the value that is reported. In the
    reward: k1, which is then the default."""
    target: float | None = Field(None, gt=0)
    """Nats a token; adapts the coefficient to hold it (Ziegler et al. 2019, arXiv:1909.08593)."""
    horizon: int = Field(10_000, ge=1)
    """Completions over which an adaptive coefficient moves."""
    measure_every_steps: MayChange[int | None] = Field(None, ge=1)
    """With a coefficient of 0: steps at which the KL is measured all the same, at the cost of scoring the reference."""

    @model_validator(mode="before")
    @classmethod
    def _fill_estimator(cls, given: Any) -> Any:
        return {"estimator": "k1"} | given if isinstance(given, dict) and given.get("placement") == "reward" else given

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.target is not None and self.coef == 0:
            must = f"be above 0 with kl.target ({self.target}): a coefficient of 0 cannot adapt"
            raise BrokenRule("coef", self.coef, must, "use coef 0.05, or remove target")
        if self.estimator != "k1" and self.placement == "reward":
            must = "be k1 in the reward: as a fixed number, no other gives the KL's gradient"
            raise BrokenRule("estimator", self.estimator, must, "remove it, or use placement: loss")
        return self


class MismatchSettings(Frozen):
    """What is done about the gap between the engine's log-probs and the trainer's, which is always measured."""

    on_resume = OnResume.REFUSED
    correction: Literal[
        "auto", "none", "token_tis", "icepop", "token_mask", "sequence_tis", "sequence_mis", "sequence_mask",
        "geometric_mis", "geometric_mask",
    ] = "auto"
    """By the ratio of a token's, or of a completion's, probabilities (geometric: its mean a token). tis: the ratio, at
    most `high`. icepop and mis: the ratio within the bounds, 0 outside. mask: 1 within the bounds, 0 outside. auto:
    token_tis for vLLM in bfloat16, icepop there for a mixture of experts, else none; the log says which."""
    low: float | None = Field(None, ge=0, lt=1)
    """Lower bound of the ratio; 0 is none. Default: the correction's own, see `MISMATCH_BOUNDS`."""
    high: float | None = Field(None, gt=1)
    """Upper bound of the ratio; default as for `low`."""

    @model_validator(mode="before")
    @classmethod
    def _translate(cls, given: Any) -> Any:
        theirs = given.get("correction") if isinstance(given, dict) else None
        ours = TRL_CORRECTIONS.get(theirs) if isinstance(theirs, str) else None
        if ours is not None:
            raise BrokenRule("correction", theirs, f"be {ours}, as TRL's {theirs} is called here", f"use {ours}")
        return given

    @model_validator(mode="after")
    def _check(self) -> Self:
        bounds = MISMATCH_BOUNDS.get(self.correction, (None, None))
        for name, usual in zip(("low", "high"), bounds, strict=True):
            if usual is None and getattr(self, name) is not None:
                must = f"stay null with correction {self.correction}, which does not read it"
                raise BrokenRule(name, getattr(self, name), must, f"remove {name}, or name a correction that does")
        return self


class OnlineConfig(EvaluatedConfig):
    """What every trainer has that learns from its own rollouts."""

    takes_rewards: ClassVar[Literal["needed", "optional", "none"]] = "needed"
    measures = "accuracy"
    num_prompts: Recorded[int] = Field(8, ge=1)
    """Prompts a step, over all ranks."""
    group_size: int = Field(8, ge=1)
    """Completions a prompt."""
    sampling: SamplingSettings = SamplingSettings()
    rollout: RolloutEngineSettings = RolloutSettings()
    num_epochs: int = Field(1, ge=1)
    """Passes over each batch of rollouts."""
    num_minibatches: int = Field(1, ge=1)
    """Optimizer steps in each pass."""
    mask_truncated: bool = False
    """Leave completions cut off by the length limit out of the loss."""
    reward_limits: RewardLimits = RewardLimits()

    @model_validator(mode="before")
    @classmethod
    def _fill_engine(cls, given: Any) -> Any:
        if isinstance(given, dict) and "rollout" in given:
            return given | {"rollout": fill_engine(given["rollout"])}
        return given

    @model_validator(mode="after")
    def _check_online(self) -> Self:
        for rule in ONLINE_RULES:
            rule(self)
        return self

    @property
    def step(self) -> str:
        """What a step is made of."""
        return (
            f"{self.num_prompts} prompts x {self.group_size} completions of at most {self.sampling.max_new_tokens} "
            f"tokens and {self.num_epochs * self.num_minibatches} updates a step"
        )


class PolicyGradientConfig(OnlineConfig):
    """What every trainer has that credits its rollouts and follows the policy gradient."""

    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    """Bounds the loss of tokens with a negative advantage (arXiv:1912.09729); off unless given."""
    kl: KLSettings = KLSettings()
    entropy_coef: float = Field(0.0, ge=0)
    mismatch: MismatchSettings = MismatchSettings()
    routing_replay: Literal["rollout", "trainer", "none"] = "rollout"
    """Experts that a mixture is trained with: those that the engine chose (R3, arXiv:2510.11370); those that the
    trainer chose before the first of several updates (R2, arXiv:2512.01374); or whatever its routers choose now."""

    @model_validator(mode="after")
    def _check_policy_gradient(self) -> Self:
        for rule in POLICY_GRADIENT_RULES:
            rule(self)
        return self
