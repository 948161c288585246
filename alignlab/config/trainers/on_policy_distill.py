"""What on-policy distillation is told."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from alignlab.config.messages import BrokenRule
from alignlab.config.online_rules import check_ignored_fields, check_on_policy
from alignlab.config.teacher import TeacherSettings
from alignlab.config.trainers.online import PolicyGradientConfig


class OnPolicyDistillConfig(PolicyGradientConfig):
    """A student samples, and each token's advantage is how much likelier its teacher finds it: the reverse KL
    (GKD, arXiv:2306.13649; MiniLLM, arXiv:2306.08543)."""

    takes_rewards = "optional"
    type: Literal["on_policy_distill"] = "on_policy_distill"
    teacher: TeacherSettings
    alignment: Literal["tokens", "text"] = "tokens"
    """tokens: the teacher has the student's tokenizer, and judges each token. text: it has its own, and judges spans of
    text that both tokenizers cut out whole; see `data.alignment`."""
    group_size: int = Field(4, ge=1)
    """Completions a prompt."""
    discount: float = Field(0.0, ge=0, le=1)
    """Of what follows a token: 0 credits it with its own KL alone, 1 with that of all the rest of the completion."""
    normalize_length: bool = False
    """Divide what follows a token by its weight, as MiniLLM does."""
    task_weight: float = Field(0.0, ge=0)
    """Of the task's rewards: their advantages within the group are added. With 0, rewards are only looked at."""
    surrogate: Literal["ppo_clip", "cispo", "reinforce"] = "ppo_clip"

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_ignored_fields(self)
        check_on_policy(self)
        if self.normalize_length and self.discount == 0:
            must = "be false with discount 0, where nothing that follows is counted"
            raise BrokenRule("normalize_length", self.normalize_length, must, "remove it, or use discount 1.0")
        if self.task_weight > 0 and self.group_size == 1:
            must = "be at least 2 with task_weight above 0: a reward is told from those of its group"
            raise BrokenRule("group_size", self.group_size, must, "use 4, or task_weight 0")
        if self.kl.placement == "reward":
            must = "be loss where the advantage is a KL itself"
            raise BrokenRule("kl.placement", self.kl.placement, must, "remove it")
        if self.kl.target is not None:
            must = "be null: the KL that is steered here is to the teacher"
            raise BrokenRule("kl.target", self.kl.target, must, "remove it")
        return self

    @property
    def method(self) -> str:
        """What is done, in a few words."""
        task = f" + {self.task_weight:g} x task" if self.task_weight else ""
        return f"on_policy_distill = reverse KL to {self.teacher.name}{task} + {self.surrogate}"
