"""Trainers whose student learns from a teacher: offline, on mixed data (GKD), and on its own samples."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.averaging import AveragedConfig
from alignlab.config.base import Frozen, OnResume, Recorded, at_home
from alignlab.config.error_messages import BrokenRule
from alignlab.config.model import Dtype
from alignlab.config.online import OnlineConfig, PolicyGradientConfig


class TeacherSettings(Frozen):
    """A frozen model whose probability of each token the student learns from."""

    on_resume = OnResume.REFUSED
    name: Recorded[str]
    """A Hub id, a local folder (of a model or an adapter), or a model that a Python package ships."""
    dtype: Dtype = "auto"
    """Of its weights; auto: bfloat16 on a GPU, float32 on a CPU."""

    _at_home = field_validator("name")(at_home)


class DistillConfig(AveragedConfig):
    """A student learns its teacher's distribution at each token of given completions (arXiv:1503.02531)."""

    takes_rewards = "optional"
    measures = "accuracy"
    evaluates_between = False
    type: Literal["distill"] = "distill"
    teacher: TeacherSettings
    num_sequences: Recorded[int] = Field(32, ge=1)
    """Examples a step, over all ranks."""
    beta: float = Field(0.0, ge=0, le=1)
    """0 is the forward KL, 1 the reverse KL, in between a Jensen-Shannon divergence; see `functional.distillation`."""
    temperature: float = Field(1.0, gt=0)
    """Of both distributions; the loss is multiplied by its square, so that the gradient keeps its size."""
    hard_label_weight: float = Field(0.0, ge=0, lt=1)
    """Weight of the cross-entropy of the completions themselves; the divergence has the remaining weight."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Part of each label of that cross-entropy that is spread evenly over the vocabulary (arXiv:1512.00567)."""
    z_loss_coef: float = Field(0.0, ge=0)
    """Weight of the squared log of the denominator of the student's softmax (arXiv:2204.02311); 1e-4 is usual."""
    top_k: int | None = Field(None, ge=1)
    """Number of the teacher's most probable tokens that are kept on disk, with the others as one: the teacher computes
    each example once, for this and later runs. None uses whole distributions, computed at each step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        because = "for offline distillation, which measures before and after training only"
        self.refuse_unread("eval_every_steps", because)
        if self.hard_label_weight == 0:
            because = "with hard_label_weight 0, where no label is learnt from"
            self.refuse_unread("label_smoothing", because, "remove it, or use hard_label_weight 0.5")
        return self

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        width = "whole distributions" if self.top_k is None else f"top {self.top_k}"
        return f"distill ({self.teacher.name}, beta {self.beta:g}, {width})"

    @property
    def step(self) -> str:
        """Short description of a step's size, for reports."""
        return f"{self.num_sequences} examples a step"


class GKDConfig(OnlineConfig):
    """A student learns its teacher's distribution at each token that it samples itself (GKD, arXiv:2306.13649)."""

    takes_rewards: ClassVar[Literal["needed", "optional", "none"]] = "optional"
    type: Literal["gkd"] = "gkd"
    teacher: TeacherSettings
    group_size: int = Field(1, ge=1)
    """Completions a prompt."""
    beta: float = Field(0.5, ge=0, le=1)
    """0 is the forward KL, 1 the reverse KL, in between a Jensen-Shannon divergence; see `functional.distillation`."""
    temperature: float = Field(1.0, gt=0)
    """Of both distributions where they are compared; the loss is multiplied by its square. The student samples at
    `sampling.temperature`."""
    student_frac: float = Field(1.0, ge=0, le=1)
    """Fraction of the prompts that the student completes (lambda); the others have the dataset's `completion` or
    `answer`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.student_frac < 1 and self.group_size > 1:
            must = "be 1 with student_frac below 1: the dataset has one completion a prompt"
            raise BrokenRule("group_size", self.group_size, must, "use group_size 1 and more num_prompts")
        if self.student_frac == 0 and self.mask_truncated:
            must = "be false with student_frac 0: the dataset's completions are whole"
            raise BrokenRule("mask_truncated", True, must, "remove it, or let the student sample")
        return self

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        return f"gkd ({self.teacher.name}, beta {self.beta:g}, student_frac {self.student_frac:g})"


class OnPolicyDistillConfig(PolicyGradientConfig, OnlineConfig):
    """A student samples, and each token's advantage is how much more probable its teacher finds it: the reverse KL
    (GKD, arXiv:2306.13649; MiniLLM, arXiv:2306.08543)."""

    takes_rewards = "optional"
    type: Literal["on_policy_distill"] = "on_policy_distill"
    teacher: TeacherSettings
    alignment: Literal["tokens", "text"] = "tokens"
    """tokens: the teacher has the student's tokenizer, and judges each token. text: it has its own, and judges spans of
    text that both tokenizers cut out whole; see `data.token_alignment`."""
    group_size: int = Field(4, ge=1)
    """Completions a prompt."""
    discount: float = Field(0.0, ge=0, le=1)
    """Of the KL of later tokens: 0 credits a token with its own KL alone, 1 with that of the whole rest of the
    completion."""
    normalize_length: bool = False
    """Divide the KL of later tokens by its total weight, as MiniLLM does."""
    task_weight: float = Field(0.0, ge=0)
    """Weight of the task's rewards, whose advantages within the group are added. With 0, rewards are only reported."""
    surrogate: Literal["ppo_clip", "cispo", "reinforce"] = "ppo_clip"

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.check_surrogate(self.surrogate)
        self._check_kl()
        if self.normalize_length and self.discount == 0:
            must = "be false with discount 0, where nothing that follows is counted"
            raise BrokenRule("normalize_length", self.normalize_length, must, "remove it, or use discount 1.0")
        if self.task_weight > 0 and self.group_size == 1:
            must = "be at least 2 with task_weight above 0: a reward is compared with those of its group"
            raise BrokenRule("group_size", self.group_size, must, "use 4, or task_weight 0")
        return self

    def _check_kl(self) -> None:
        if self.kl.placement == "reward":
            raise BrokenRule("kl.placement", "reward", "be loss where the advantage is a KL itself", "remove it")
        if self.kl.target is not None:
            must = "be null: the KL that is steered here is to the teacher"
            raise BrokenRule("kl.target", self.kl.target, must, "remove it")

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        task = f" + {self.task_weight:g} x task" if self.task_weight else ""
        return f"on_policy_distill = reverse KL to {self.teacher.name}{task} + {self.surrogate}"
