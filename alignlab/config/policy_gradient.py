"""GRPO and its family, with the recipes of their papers, and PPO with its critic."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.base import Frozen, OnResume, Recorded
from alignlab.config.error_messages import BrokenRule
from alignlab.config.online import KLSettings, OnlineConfig, PolicyGradientConfig, Surrogate
from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainer import OptimSettings

_log = logging.getLogger(__name__)

Recipe = Literal["grpo", "dr_grpo", "dapo", "rloo", "reinforce_pp", "reinforce_pp_baseline", "gspo", "cispo"]
Advantage = Literal[
    "group_normalized", "group_centered", "leave_one_out", "batch_whitened", "token_whitened", "group_centered_whitened"
]
Reduction = Literal["token_mean", "sequence_mean", "constant"]

# A recipe holds what differs from the defaults of `GRPOConfig`, which are those of GRPO itself. It sets no KL term, no
# group size and no learning rate: papers tune these to their model.
RECIPES: Mapping[str, Mapping[str, Any]] = {
    # Shao et al. (2024), arXiv:2402.03300, Eq. 3.
    "grpo": {},
    # Liu et al. (2025), arXiv:2503.20783: neither the group's deviation nor a length divides.
    "dr_grpo": {"advantage": "group_centered", "reduction": "constant"},
    # Yu et al. (2025), arXiv:2503.14476, Eqs. 8-13; its overlong buffer comes from the length limit.
    "dapo": {"reduction": "token_mean", "clip_high": 0.28, "dynamic_sampling": True},
    # Ahmadian et al. (2024), arXiv:2402.14740: REINFORCE on whole completions, so no length divides.
    "rloo": {"advantage": "leave_one_out", "surrogate": "reinforce", "reduction": "constant"},
    # Hu et al. (2025), arXiv:2501.03262v9, Eqs. 8-10: whitened over all tokens of the batch; the authors' code averages
    # over tokens. With a baseline (the paper's form for groups), the group's mean is taken off first.
    "reinforce_pp": {"advantage": "token_whitened", "reduction": "token_mean"},
    "reinforce_pp_baseline": {"advantage": "group_centered_whitened", "reduction": "token_mean"},
    # Zheng et al. (2025), arXiv:2507.18071, Sec. 5.1.
    "gspo": {"surrogate": "gspo_clip", "clip_low": 3e-4, "clip_high": 4e-4},
    # MiniMax (2025), arXiv:2506.13585; it publishes no bound: a ratio is capped at 5, as in arXiv:2510.13786.
    "cispo": {"surrogate": "cispo", "reduction": "token_mean", "clip_high": 4.0},
}
# DAPO penalises the last 4,096 of 20,480 tokens.
OVERLONG_BUFFER_FRAC = 0.2

# A sequence's ratio is a mean over its tokens and stays within about 1e-3 of 1: a wider clip never acts.
MAX_GSPO_CLIP = 0.05
# Advantages that differ between the tokens of a completion.
TOKEN_ADVANTAGES = ("token_whitened", "group_centered_whitened")
# Advantages that compare a completion with all others of the step, not with its group's.
STEP_ADVANTAGES = ("batch_whitened", "token_whitened")


class GRPOConfig(PolicyGradientConfig, OnlineConfig):
    """Critic-free reinforcement learning with a group baseline (GRPO, arXiv:2402.03300, and its family)."""

    type: Literal["grpo"] = "grpo"
    recipe: Recipe = "grpo"
    """Sets the fields from `advantage` to `overlong_buffer_tokens` that are not given; see `RECIPES`."""
    group_size: int = Field(8, ge=2)
    """Completions a prompt."""
    advantage: Advantage = "group_normalized"
    """See `functional.advantages`. Relative to the group: divided by the group's standard deviation or not, or relative
    to the others of the group (leave_one_out). Relative to the whole step: over completions (batch_whitened) or over
    tokens (token_whitened; group_centered_whitened subtracts the group's mean first)."""
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
    def _fill_recipe(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        recipe = raw.get("recipe", "grpo")
        filled = dict(RECIPES.get(recipe, {}))
        if recipe == "dapo":
            filled["overlong_buffer_tokens"] = max(1, round(OVERLONG_BUFFER_FRAC * _length_limit(raw)))
        return {**filled, **raw}

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_gspo_clip()
        self.check_surrogate(self.surrogate)
        self._check_overlong()
        for text in self.warnings:
            _log.warning("%s", text)
        return self

    def _check_gspo_clip(self) -> None:
        for name in ("clip_low", "clip_high"):
            value = getattr(self, name)
            if self.surrogate == "gspo_clip" and value > MAX_GSPO_CLIP:
                must = f"be at most {MAX_GSPO_CLIP} with gspo_clip: on a sequence's mean ratio, a wider clip never acts"
                raise BrokenRule(name, value, must, "use recipe: gspo, or clip_low 3e-4 and clip_high 4e-4")

    def _check_overlong(self) -> None:
        buffer, limit = self.overlong_buffer_tokens, self.sampling.max_new_tokens
        if buffer is None:
            because = "without overlong_buffer_tokens, where nothing is penalised"
            self.refuse_unread("overlong_penalty", because, "give overlong_buffer_tokens")
        elif buffer >= limit:
            fix = f"use {max(1, limit // 5)}, or null for no penalty" if limit > 1 else "use null for no penalty"
            raise BrokenRule("overlong_buffer_tokens", buffer, f"be less than sampling.max_new_tokens ({limit})", fix)

    @property
    def warnings(self) -> tuple[str, ...]:
        """A sentence for each combination of settings that is allowed and hardly meant, with what to use instead."""
        checks = (_warn_of_gspo_reduction, _warn_of_gspo_token_advantages, _warn_of_dynamic_sampling)
        return tuple(text for check in checks if (text := check(self)) is not None)

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        return f"{self.recipe} = {self.advantage} + {self.surrogate} + {self.reduction}"


def _length_limit(raw: Mapping[str, Any]) -> int:
    """Return `sampling.max_new_tokens` of settings that are not validated yet."""
    sampling = raw.get("sampling", SamplingSettings())
    limit = dict(sampling).get("max_new_tokens") if isinstance(sampling, dict | SamplingSettings) else None
    return limit if isinstance(limit, int) else SamplingSettings().max_new_tokens


def _warn_of_gspo_reduction(config: GRPOConfig) -> str | None:
    """GSPO's objective is a mean over sequences; a sum over tokens weights a sequence's ratio by its length."""
    if config.surrogate != "gspo_clip" or config.reduction == "sequence_mean":
        return None
    return (
        f"reduction is {config.reduction} with surrogate gspo_clip, whose loss is the same on all tokens of a "
        "sequence: each sequence weighs its length, where GSPO (arXiv:2507.18071, Eq. 5) weighs all alike; "
        "use reduction: sequence_mean, or surrogate: ppo_clip"
    )


def _warn_of_gspo_token_advantages(config: GRPOConfig) -> str | None:
    """One ratio a sequence has one gradient a sequence: advantages that vary inside it are averaged away."""
    varies = config.advantage in TOKEN_ADVANTAGES and config.kl.placement == "reward" and config.kl.coef > 0
    if config.surrogate != "gspo_clip" or not varies:
        return None
    return (
        f"surrogate is gspo_clip with advantage {config.advantage} and kl.placement reward: each token has an "
        "advantage of its own, and one ratio a sequence gives all of them the gradient of their mean; "
        "use surrogate: ppo_clip, or kl.placement: loss"
    )


def _warn_of_dynamic_sampling(config: GRPOConfig) -> str | None:
    """A baseline of the whole batch learns from groups of equal rewards as much as from others."""
    if not config.dynamic_sampling or config.advantage not in STEP_ADVANTAGES:
        return None
    return (
        f"dynamic_sampling is true with advantage {config.advantage}, whose baseline is the whole batch's: it drops "
        "groups whose rewards are all equal, and these differ from the batch and would be learnt from; "
        "use dynamic_sampling: false, or advantage: group_centered_whitened"
    )


class CriticSettings(Frozen):
    """The critic of PPO: where its weights are, and how it is trained."""

    on_resume = OnResume.REFUSED
    form: Literal["lora", "head", "model"] = "lora"
    """lora: an adapter of its own and a value head on the policy's frozen base. head: the head alone, on the unchanged
    base. model: a copy of the starting policy, trained as the policy is, with a head."""
    rank: int = Field(16, ge=1)
    """Rank of the adapter."""
    alpha: float = Field(32.0, gt=0)
    """Alpha of the adapter."""
    learning_rate: Recorded[float | None] = Field(None, gt=0)
    """Default: ten times the policy's."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far an update may move a value, in units of reward; null does not bound it."""
    warmup_steps: int = Field(0, ge=0)
    """First steps, in which the critic learns and the policy does not."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.form != "lora":
            for name in ("rank", "alpha"):
                because = f"with form {self.form}, which has no adapter of its own"
                self.refuse_unread(name, because, f"remove {name}, or use form: lora")
        return self


class PPOConfig(PolicyGradientConfig, OnlineConfig):
    """Proximal policy optimisation with a critic (arXiv:1707.06347), the KL to the reference priced in the reward."""

    type: Literal["ppo"] = "ppo"
    surrogate: ClassVar[Literal["ppo_clip"]] = "ppo_clip"
    group_size: int = Field(1, ge=1)
    """Completions a prompt; the critic needs no group."""
    num_prompts: Recorded[int] = Field(64, ge=1)
    """Prompts a step, over all ranks."""
    num_epochs: int = Field(2, ge=1)
    """Passes over each batch of rollouts."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount factor per token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """Of generalised advantage estimation (arXiv:1506.02438): 1 trusts the rewards alone, 0 the critic after one
    token."""
    whiten_advantages: bool = True
    """To mean 0 and variance 1, over all tokens and ranks of a step."""
    critic: CriticSettings = CriticSettings()

    @model_validator(mode="before")
    @classmethod
    def _fill_kl(cls, raw: Any) -> Any:
        """Place the KL in the reward by default."""
        if not isinstance(raw, dict):
            return raw
        kl = raw.get("kl", {})
        kl = kl.model_dump(exclude_unset=True) if isinstance(kl, KLSettings) else kl
        return raw | {"kl": {"coef": 0.05, "placement": "reward"} | kl} if isinstance(kl, dict) else raw

    @model_validator(mode="after")
    def _check_warmups(self) -> Self:
        if self.critic.warmup_steps >= self.num_steps:
            must = f"be less than num_steps ({self.num_steps}), or the policy never learns"
            raise BrokenRule("critic.warmup_steps", self.critic.warmup_steps, must, f"use {self.num_steps // 10}")
        policy_steps = self.num_steps - self.critic.warmup_steps
        if self.optim.warmup_steps >= policy_steps:
            must = f"be less than the {policy_steps} steps in which the policy learns (num_steps - critic.warmup_steps)"
            raise BrokenRule("optim.warmup_steps", self.optim.warmup_steps, must, f"use {policy_steps // 10}")
        return self

    @property
    def critic_optim(self) -> OptimSettings:
        """The policy's optimizer settings with the critic's learning rate; all of its weights train.

        Its value head starts at 0, and no model is made of a critic whose zeros would have to stay.
        """
        rate = self.critic.learning_rate or 10 * self.optim.learning_rate
        return self.optim.model_copy(update={"learning_rate": rate, "keep_zeros": False})

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        return f"ppo (critic: {self.critic.form})"
