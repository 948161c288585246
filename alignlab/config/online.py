"""Trainers that learn from their own rollouts; what those that follow a policy gradient share; and online DPO."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.averaging import AveragedConfig
from alignlab.config.base import Frozen, MayChange, OnResume, Recorded
from alignlab.config.error_messages import BrokenRule
from alignlab.config.offline import PairLossConfig
from alignlab.config.rewards import RewardLimits
from alignlab.config.rollout import (
    CONTROLS,
    MAX_VLLM_TEMPERATURE,
    RolloutEngineSettings,
    RolloutSettings,
    SamplingSettings,
    approximate_cache,
    fill_engine,
    max_staleness,
    quantization,
    served_cache,
)
from alignlab.config.trl_names import TRL_CORRECTIONS

MISMATCH_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "token_tis": (None, 2.0), "icepop": (0.5, 5.0), "token_mask": (0.5, 5.0),
    "sequence_tis": (None, 2.0), "sequence_mis": (0.5, 2.0), "sequence_mask": (0.5, 2.0),
    "geometric_mis": (0.95, 1.05), "geometric_mask": (0.95, 1.05),
}  # fmt: skip
# Corrections whose weight is an importance ratio, not a mask alone.
IMPORTANCE_WEIGHTS = ("token_tis", "icepop", "sequence_tis", "sequence_mis")

Surrogate = Literal["ppo_clip", "gspo_clip", "cispo", "reinforce"]
# By surrogate: fields that it does not read.
UNREAD_BY: dict[Surrogate, tuple[str, ...]] = {
    "reinforce": ("clip_low", "clip_high", "dual_clip"),
    "cispo": ("clip_low", "dual_clip"),
    "gspo_clip": ("dual_clip",),
    "ppo_clip": (),
}


class OnlineConfig(AveragedConfig):
    """Settings of every trainer that learns from its own rollouts."""

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
    def _fill_engine(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "rollout" in raw:
            return raw | {"rollout": fill_engine(raw["rollout"])}
        return raw

    @model_validator(mode="after")
    def _check_minibatches(self) -> Self:
        """Mini-batches are cut between groups, and must be equal."""
        prompts, parts = self.num_prompts, self.num_minibatches
        if prompts % parts:
            multiples = [n for n in (prompts // parts * parts, (prompts // parts + 1) * parts) if n]
            fix = f"use {' or '.join(map(str, multiples))}"
            raise BrokenRule("num_prompts", prompts, f"be a multiple of num_minibatches ({parts})", fix)
        return self

    @model_validator(mode="after")
    def _check_evaluated_average(self) -> Self:
        """An evaluation of the average has the engine sample from it."""
        staleness = max_staleness(self.rollout)
        if self.ema is not None and self.ema.evaluate and staleness:
            must = f"be false with rollout.max_staleness {staleness}: rollouts that are sampled ahead would be its own"
            raise BrokenRule("ema.evaluate", True, must, "use false, or rollout.max_staleness 0")
        return self

    @model_validator(mode="after")
    def _check_temperature(self) -> Self:
        temperature, engine = self.sampling.temperature, self.rollout.engine
        if temperature == 0:
            must = "be above 0: greedy completions of a prompt are identical, and nothing is explored"
            raise BrokenRule("sampling.temperature", temperature, must, "use 1.0")
        if engine != "embedded" and temperature > MAX_VLLM_TEMPERATURE:
            must = f"be at most {MAX_VLLM_TEMPERATURE:g} with rollout.engine {engine}: vLLM samples no hotter"
            raise BrokenRule("sampling.temperature", temperature, must, "lower it, or use rollout.engine: embedded")
        return self

    @model_validator(mode="after")
    def _check_controls(self) -> Self:
        """The loss is of the policy's own distribution: for a token that was forced its ratio means nothing."""
        for name in CONTROLS:
            value = getattr(self.sampling, name)
            if value:
                must = "be left out of a training on rollouts: the trainer's log-probs are of the policy without it"
                raise BrokenRule(f"sampling.{name}", value, must, "remove it, or reward the format instead")
        return self

    @model_validator(mode="after")
    def _check_quantization(self) -> Self:
        """A quantized engine samples from other probabilities than the policy's: the loss must be weighted."""
        form = quantization(self.rollout)
        if form is None:
            return self
        if not isinstance(self, PolicyGradientConfig):
            must = "be null with a trainer that has no mismatch.correction: the completions are not the policy's own"
            raise BrokenRule("rollout.quantization", form, must, "remove it, or use type: grpo or ppo")
        if self.mismatch.correction == "none":
            must = f"be another with rollout.quantization {form}: its probabilities are not the policy's"
            raise BrokenRule("mismatch.correction", "none", must, "use auto, or remove rollout.quantization")
        return self

    @model_validator(mode="after")
    def _check_cache(self) -> Self:
        """Where the trainer does not replay the engine's approximation of the cache, the loss must be weighted."""
        served, cache = served_cache(self.rollout), approximate_cache(self.rollout)
        if served is None and (cache is None or cache.replay):
            return self
        if not isinstance(self, PolicyGradientConfig):
            must = "with a trainer that has no mismatch.correction: the completions are not the policy's own"
            fix = "remove it, or use type: grpo or ppo"
            if served is not None:
                raise BrokenRule("rollout.kv_cache", served, f"be null {must}", fix)
            raise BrokenRule("rollout.kv_cache.replay", False, f"be true {must}", fix)
        if served and self.mismatch.correction == "none":
            must = f"be another with rollout.kv_cache {served}, which vLLM rounds and the trainer does not"
            raise BrokenRule("mismatch.correction", "none", must, "use auto, or remove rollout.kv_cache")
        if cache is None:
            return self
        if self.mismatch.correction == "none":
            must = f"be another with rollout.kv_cache {cache.type} that is not replayed: the policy samples otherwise"
            raise BrokenRule("mismatch.correction", "none", must, "use auto, or rollout.kv_cache.replay: true")
        return self

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps on each batch of rollouts."""
        return self.num_epochs * self.num_minibatches

    @property
    def step(self) -> str:
        """Short description of a step's size, for reports."""
        return (
            f"{self.num_prompts} prompts x {self.group_size} completions of at most {self.sampling.max_new_tokens} "
            f"tokens and {self.updates_per_step} updates a step"
        )


class KLSettings(Frozen):
    """KL to the reference. Estimators: Schulman, "Approximating KL Divergence" (2020)."""

    on_resume = OnResume.REFUSED
    coef: float = Field(0.0, ge=0)
    """0: the KL is no part of the loss or reward; `measure_every_steps` may still report it."""
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
    """With a coefficient of 0: steps at which the KL is measured, at the cost of the reference's log-probs."""

    @model_validator(mode="before")
    @classmethod
    def _fill_estimator(cls, raw: Any) -> Any:
        return {"estimator": "k1"} | raw if isinstance(raw, dict) and raw.get("placement") == "reward" else raw

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
    """Correction of the gap between the engine's log-probs and the trainer's, which is always measured."""

    on_resume = OnResume.REFUSED
    correction: Literal[
        "auto", "none", "token_tis", "icepop", "token_mask", "sequence_tis", "sequence_mis", "sequence_mask",
        "geometric_mis", "geometric_mask",
    ] = "auto"
    """By the ratio of a token's, or of a completion's, probabilities (geometric: its mean a token). tis: the ratio, at
    most `high`. icepop and mis: the ratio within the bounds, 0 outside. mask: 1 within the bounds, 0 outside. auto:
    token_tis for vLLM in bfloat16 and for engines that round weights or the cache, icepop there for a mixture of
    experts, else none; the log says which."""
    low: float | None = Field(None, ge=0, lt=1)
    """Lower bound of the ratio; 0 is none. Default: by correction, see `MISMATCH_BOUNDS`."""
    high: float | None = Field(None, gt=1)
    """Upper bound of the ratio; default as for `low`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_trl_name(cls, raw: Any) -> Any:
        trl_name = raw.get("correction") if isinstance(raw, dict) else None
        name = TRL_CORRECTIONS.get(trl_name) if isinstance(trl_name, str) else None
        if name is not None:
            raise BrokenRule("correction", trl_name, f"be {name}, as TRL's {trl_name} is called here", f"use {name}")
        return raw

    @model_validator(mode="after")
    def _check(self) -> Self:
        bounds = MISMATCH_BOUNDS.get(self.correction, (None, None))
        for name, default_bound in zip(("low", "high"), bounds, strict=True):
            if default_bound is None:
                because = f"with correction {self.correction}, which does not read it"
                self.refuse_unread(name, because, f"remove {name}, or name a correction that does")
        return self


class PolicyGradientConfig(Frozen):
    """Fields of trainers that credit their rollouts and follow the policy gradient; beside `OnlineConfig`."""

    on_resume = OnResume.REFUSED
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    """Bounds the loss of tokens with a negative advantage (arXiv:1912.09729); off unless given."""
    kl: KLSettings = KLSettings()
    entropy_coef: float = Field(0.0, ge=0)
    mismatch: MismatchSettings = MismatchSettings()
    routing_replay: Literal["rollout", "trainer", "none"] = "rollout"
    """Experts that a mixture is trained with: those that the engine chose (R3, arXiv:2510.11370); those that the
    trainer chose before the first of several updates (R2, arXiv:2512.01374); or those that its routers choose now."""

    @model_validator(mode="after")
    def _check_policy_gradient(self) -> Self:
        assert isinstance(self, OnlineConfig)
        self._check_staleness()
        if self.routing_replay == "trainer" and self.updates_per_step == 1:
            must = "be rollout or none where a batch has one update: the router then chooses the same experts anyway"
            raise BrokenRule("routing_replay", self.routing_replay, must, "use rollout, or num_minibatches 2 or more")
        # A step of more completions than the horizon would move the coefficient by over 20 %, and even below 0.
        num_completions = self.num_prompts * self.group_size
        if self.kl.target is not None and self.kl.horizon < num_completions:
            must = f"be at least the step's {num_completions} completions (num_prompts x group_size)"
            raise BrokenRule("kl.horizon", self.kl.horizon, must, f"use {num_completions} or more")
        return self

    def _check_staleness(self) -> None:
        """Tokens of older weights need an importance weight, not a mask alone (arXiv:2505.24298, Eq. 5)."""
        assert isinstance(self, OnlineConfig)
        staleness, correction = max_staleness(self.rollout), self.mismatch.correction
        if staleness and correction not in ("auto", *IMPORTANCE_WEIGHTS):
            choices = f"{', '.join(IMPORTANCE_WEIGHTS[:-1])} or {IMPORTANCE_WEIGHTS[-1]}"
            must = f"be {choices} with rollout.max_staleness {staleness}: tokens of older weights must be weighted"
            raise BrokenRule("mismatch.correction", correction, must, "use auto, or rollout.max_staleness 0")

    def check_surrogate(self, surrogate: Surrogate) -> None:
        """Raise if a field is given that the surrogate does not read, or updates that it cannot correct."""
        assert isinstance(self, OnlineConfig)
        for name in UNREAD_BY[surrogate]:
            because = f"with surrogate {surrogate}, which does not read it"
            self.refuse_unread(name, because, f"remove {name}, or use surrogate: ppo_clip")
        if surrogate == "reinforce" and self.updates_per_step > 1:
            name = "num_epochs" if self.num_epochs > 1 else "num_minibatches"
            must = "be 1 with surrogate reinforce, which has no ratio to correct later, off-policy updates"
            raise BrokenRule(name, getattr(self, name), must, f"use {name} 1, or surrogate: ppo_clip")


class OnlineDPOConfig(PairLossConfig, OnlineConfig):
    """DPO on pairs of the policy's own completions, ordered by their rewards (arXiv:2402.04792)."""

    type: Literal["online_dpo"] = "online_dpo"
    group_size: int = Field(2, ge=2)
    """Completions a prompt; the best and the worst of them are the pair."""
    mask_truncated: bool = False
    """Leave completions cut off by the length limit out of the pairs."""

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        return f"online dpo ({self.loss}, beta {self.beta:g})"
