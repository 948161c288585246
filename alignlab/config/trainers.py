"""What each trainer is told. A trainer's section is chosen by its `type` and holds only its own fields."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule
from alignlab.config.online_rules import GRPO_RULES, ONLINE_RULES
from alignlab.config.recipes import fill_recipe
from alignlab.config.rewards import RewardLimits
from alignlab.config.rollout import RolloutEngineSettings, RolloutSettings, SamplingSettings, fill_engine

Recipe = Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "gspo", "cispo"]
Advantage = Literal["group_normalized", "group_centered", "leave_one_out", "batch_whitened"]
Surrogate = Literal["ppo_clip", "gspo_clip", "cispo", "reinforce"]
Reduction = Literal["token_mean", "sequence_mean", "constant"]


MISMATCH_BOUNDS: dict[str, tuple[float | None, float | None]] = {
    "token_tis": (None, 2.0), "icepop": (0.5, 5.0), "sequence_mask": (0.5, 2.0), "geometric_mask": (0.95, 1.05),
}  # fmt: skip


class TrainerConfig(Frozen):
    """What every trainer has."""

    output_dir: Path = Path("runs/alignlab")
    seed: int = Field(0, ge=0, lt=2**32)
    num_steps: int = Field(100, ge=1)
    """Batches of rollouts or of examples."""
    learning_rate: float = Field(1e-5, gt=0)
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """After the warm-up: constant, or decaying to 0 at the last step."""
    warmup_steps: int = Field(0, ge=0)
    """Steps, of however many updates each."""
    weight_decay: float = Field(0.0, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    max_grad_norm: float = Field(1.0, gt=0)
    tokens_per_microbatch: int = Field(4096, ge=1)
    """Tokens in one forward and backward pass; changes memory and speed, never the gradient."""
    logprob_chunk_tokens: int = Field(512, ge=1)
    """Tokens whose logits exist at one time."""
    gradient_checkpointing: bool = False
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite: stop, or skip the update and count it."""
    save_every_steps: int | None = Field(None, ge=1)
    """None saves at the end and on interruption only."""
    keep_checkpoints: int = Field(2, ge=1)
    trackers: tuple[str, ...] = ("tensorboard",)
    """Names of accelerate's trackers, beside metrics.jsonl, which is always written."""

    @field_validator("output_dir")
    @classmethod
    def _at_home(cls, path: Path) -> Path:
        return path.expanduser()

    @model_validator(mode="after")
    def _check_warmup(self) -> Self:
        if self.warmup_steps >= self.num_steps:
            must = f"be less than num_steps ({self.num_steps})"
            raise BrokenRule("warmup_steps", self.warmup_steps, must, f"use {self.num_steps // 10}")
        return self


class SFTConfig(TrainerConfig):
    """Supervised fine-tuning on prompt and completion; the loss is on the completion alone."""

    type: Literal["sft"] = "sft"
    num_sequences: int = Field(32, ge=1)
    """Examples a step, over all ranks."""


class KLSettings(Frozen):
    """KL to the reference. Estimators: Schulman, "Approximating KL Divergence" (2020)."""

    coef: float = Field(0.0, ge=0)
    """0: the KL is not priced; `measure_every_steps` may still show it."""
    placement: Literal["loss", "reward"] = "loss"
    estimator: Literal["k1", "k2", "k3"] = "k2"
    """In the loss: all three have the KL's gradient, see `kl_loss`, and differ in the value that is reported. In the
    reward: k1, which is then the default."""
    target: float | None = Field(None, gt=0)
    """Nats a token; adapts the coefficient to hold it (Ziegler et al. 2019, arXiv:1909.08593)."""
    horizon: int = Field(10_000, ge=1)
    """Completions over which an adaptive coefficient moves."""
    measure_every_steps: int | None = Field(None, ge=1)
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

    correction: Literal["auto", "none", "token_tis", "icepop", "sequence_mask", "geometric_mask"] = "auto"
    """auto: token_tis for vLLM in bfloat16, icepop there for a mixture of experts, else none; the log says which."""
    low: float | None = Field(None, gt=0, lt=1)
    high: float | None = Field(None, gt=1)
    """Bounds of the ratio, see `functional.mismatch`; default: the correction's own, see `MISMATCH_BOUNDS`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        bounds = MISMATCH_BOUNDS.get(self.correction, (None, None))
        for name, usual in zip(("low", "high"), bounds, strict=True):
            if usual is None and getattr(self, name) is not None:
                must = f"stay null with correction {self.correction}, which does not read it"
                raise BrokenRule(name, getattr(self, name), must, f"remove {name}, or name a correction that does")
        return self


class OnlineConfig(TrainerConfig):
    """What every trainer has that learns from its own rollouts."""

    num_prompts: int = Field(8, ge=1)
    """Prompts a step, over all ranks."""
    group_size: int = Field(8, ge=1)
    """Completions a prompt."""
    sampling: SamplingSettings = SamplingSettings()
    rollout: RolloutEngineSettings = RolloutSettings()
    num_epochs: int = Field(1, ge=1)
    """Passes over each batch of rollouts."""
    num_minibatches: int = Field(1, ge=1)
    """Optimizer steps in each pass."""
    clip_low: float = Field(0.2, gt=0, lt=1)
    clip_high: float = Field(0.2, gt=0)
    dual_clip: float | None = Field(None, gt=1)
    """Bounds the loss of tokens with a negative advantage (arXiv:1912.09729); off unless given."""
    mask_truncated: bool = False
    """Leave completions cut off by the length limit out of the loss."""
    kl: KLSettings = KLSettings()
    entropy_coef: float = Field(0.0, ge=0)
    mismatch: MismatchSettings = MismatchSettings()
    routing_replay: Literal["rollout", "trainer", "none"] = "rollout"
    """Experts that a mixture is trained with: those that the engine chose (R3, arXiv:2510.11370); those that the
    trainer chose before the first of several updates (R2, arXiv:2512.01374); or whatever its routers choose now."""
    reward_limits: RewardLimits = RewardLimits()
    eval_every_steps: int | None = Field(None, ge=1)
    """Evaluate during training too; before and after is always done where there is evaluation data."""

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


class GRPOConfig(OnlineConfig):
    """Critic-free reinforcement learning with a group baseline (GRPO, arXiv:2402.03300, and its family)."""

    type: Literal["grpo"] = "grpo"
    recipe: Recipe = "grpo"
    """Sets the fields from `advantage` to `overlong_buffer_tokens` that are not given; see `recipes`."""
    group_size: int = Field(8, ge=2)
    """Completions a prompt."""
    advantage: Advantage = "group_normalized"
    surrogate: Surrogate = "ppo_clip"
    reduction: Reduction = "sequence_mean"
    dynamic_sampling: bool = False
    """Drop groups whose rewards are all equal, and sample others in their place (DAPO)."""
    max_refills: int = Field(3, ge=1)
    """Further rounds of sampling a step under `dynamic_sampling`."""
    overlong_buffer_tokens: int | None = Field(None, ge=1)
    """Length, below the limit, over which a completion is penalised (DAPO, Eq. 13)."""
    overlong_penalty: float = Field(1.0, gt=0)
    """The penalty at the limit."""

    @model_validator(mode="before")
    @classmethod
    def _fill_recipe(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        sampling = given.get("sampling", SamplingSettings())
        sampling = dict(sampling) if isinstance(sampling, dict | SamplingSettings) else {}
        limit = sampling.get("max_new_tokens")
        default = SamplingSettings.model_fields["max_new_tokens"].default
        return fill_recipe(given, limit if isinstance(limit, int) else default)

    @model_validator(mode="after")
    def _check(self) -> Self:
        for rule in GRPO_RULES:
            rule(self)
        return self


class CriticSettings(Frozen):
    """The critic of PPO: where it lives, and how it is trained."""

    form: Literal["lora", "head", "model"] = "lora"
    """lora: an adapter of its own and a value head on the policy's frozen base. head: the head alone, on the base as it
    is. model: a copy of the starting policy, trained as the policy is, with a head."""
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """Of the adapter."""
    learning_rate: float | None = Field(None, gt=0)
    """Default: ten times the policy's."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far an update may move a value, in units of reward; null does not bound it."""
    warmup_steps: int = Field(0, ge=0)
    """First steps, in which the critic learns and the policy does not."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("rank", "alpha"):
            default = type(self).model_fields[name].default
            if self.form != "lora" and getattr(self, name) != default:
                must = f"stay {default} with form {self.form}, which has no adapter of its own"
                raise BrokenRule(name, getattr(self, name), must, f"remove {name}, or use form: lora")
        return self


class PPOConfig(OnlineConfig):
    """Proximal policy optimisation with a critic (arXiv:1707.06347), the KL to the reference priced in the reward."""

    type: Literal["ppo"] = "ppo"
    surrogate: ClassVar[Surrogate] = "ppo_clip"
    group_size: int = Field(1, ge=1)
    """Completions a prompt; the critic needs no group."""
    num_prompts: int = Field(64, ge=1)
    """Prompts a step, over all ranks."""
    num_epochs: int = Field(2, ge=1)
    """Passes over each batch of rollouts."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount of a token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Of the generalised advantages (arXiv:1506.02438): 1 trusts the rewards alone, 0 the critic after one token."""
    whiten_advantages: bool = True
    """To mean 0 and variance 1, over all tokens and ranks of a step."""
    critic: CriticSettings = CriticSettings()

    @model_validator(mode="before")
    @classmethod
    def _fill_kl(cls, given: Any) -> Any:
        """The KL is in the reward unless it is said otherwise."""
        if not isinstance(given, dict):
            return given
        kl = given.get("kl", {})
        kl = kl.model_dump(exclude_unset=True) if isinstance(kl, KLSettings) else kl
        return given | {"kl": {"coef": 0.05, "placement": "reward"} | kl} if isinstance(kl, dict) else given

    @model_validator(mode="after")
    def _check_warmup_of_critic(self) -> Self:
        if self.critic.warmup_steps >= self.num_steps:
            must = f"be less than num_steps ({self.num_steps}), or the policy never learns"
            raise BrokenRule("critic.warmup_steps", self.critic.warmup_steps, must, f"use {self.num_steps // 10}")
        left = self.num_steps - self.critic.warmup_steps
        if self.warmup_steps >= left:
            must = f"be less than the {left} steps in which the policy learns (num_steps - critic.warmup_steps)"
            raise BrokenRule("warmup_steps", self.warmup_steps, must, f"use {left // 10}")
        return self


PreferenceLoss = Literal["sigmoid", "robust", "ipo", "ipo_mean", "hinge", "simpo", "orpo"]
REFERENCE_FREE = ("simpo", "orpo")
# Fields that a preference loss does not read; a value that is not the default would be ignored in silence.
READ_BY = {"label_smoothing": ("sigmoid", "robust"), "simpo_gamma": ("simpo",)}


class DPOConfig(TrainerConfig):
    """Learning from preferences directly, without a reward model (DPO, arXiv:2305.18290, and its family)."""

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
