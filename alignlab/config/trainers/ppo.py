"""What PPO and its critic are told."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from alignlab.config.base import Frozen
from alignlab.config.messages import BrokenRule
from alignlab.config.on_resume import OnResume, Recorded
from alignlab.config.trainers.online import KLSettings, PolicyGradientConfig


class CriticSettings(Frozen):
    """The critic of PPO: where it lives, and how it is trained."""

    on_resume = OnResume.REFUSED
    form: Literal["lora", "head", "model"] = "lora"
    """lora: an adapter of its own and a value head on the policy's frozen base. head: the head alone, on the base as it
    is. model: a copy of the starting policy, trained as the policy is, with a head."""
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    """Of the adapter."""
    learning_rate: Recorded[float | None] = Field(None, gt=0)
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


class PPOConfig(PolicyGradientConfig):
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

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        return f"ppo (critic: {self.critic.form})"
