"""Reinforcement learning from a judge's feedback: constitution, judge, and the way the feedback takes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen, MayChange, OnResume, Recorded, at_home
from alignlab.config.error_messages import BrokenRule
from alignlab.config.judge import AnyJudge, fill_judge
from alignlab.config.offline import DPOConfig, RewardConfig, SFTConfig
from alignlab.config.online import OnlineConfig, OnlineDPOConfig
from alignlab.config.policy_gradient import GRPOConfig, PPOConfig
from alignlab.config.rollout import RolloutEngineSettings, RolloutSettings, SamplingSettings, fill_engine
from alignlab.config.trainer import NumericsSettings, ShardingSettings, TrainerConfig
from alignlab.files.home_folder import with_home

FeedbackPath = Literal["revision", "dpo", "reward_model", "direct", "online_dpo"]
# By path: trainers that the last stage may have.
POLICIES: dict[str, tuple[str, ...]] = {
    "revision": (),
    "dpo": ("dpo",),
    "reward_model": ("grpo", "ppo"),
    "direct": ("grpo", "ppo"),
    "online_dpo": ("online_dpo",),
}
LABELLED = ("dpo", "reward_model")
# Fields of a stage that the run fills in, and why they must be left out.
_OF_THE_RUN = {
    "output_dir": "be left out: every stage is in a folder of its own in trainer.output_dir",
    "seed": "be left out: it is trainer.seed for every stage",
    "eval_every_steps": "be left out: held-out data is looked at before the first stage and after the last",
    "early_stopping": "be left out: held-out data is looked at before the first stage and after the last",
    "ema": "be left out: a stage goes on from the weights in training",
    "margin_column": "be left out: a judge gives a probability, and no margin",
    "probability_column": "be left out: the judge's labels are soft where the loss takes them",
}


class _Sampled(Frozen):
    """Completions of the policy that a judge or a critic reads."""

    on_resume = OnResume.REFUSED
    num_prompts: Recorded[int | None] = Field(None, ge=1)
    """Number of prompts of the training data; default: all."""
    sampling: SamplingSettings = SamplingSettings()
    rollout: RolloutEngineSettings = RolloutSettings()
    prompts_per_batch: MayChange[int] = Field(32, ge=1)
    """Prompts that are generated together, and then written to disk."""

    @model_validator(mode="before")
    @classmethod
    def _fill_engine(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and "rollout" in raw:
            return raw | {"rollout": fill_engine(raw["rollout"])}
        return raw


class RevisionSettings(_Sampled):
    """Critique and revision of the policy's own completions, and supervised fine-tuning on the last version."""

    num_revisions: int = Field(1, ge=1)
    max_new_tokens: int = Field(256, ge=1)
    """Limit of a critique, and of a revision."""
    temperature: float = Field(0.7, ge=0)
    trainer: SFTConfig = SFTConfig()


class LabelSettings(_Sampled):
    """Pairs of the policy's completions, labelled by the judge."""

    min_confidence: float = Field(0.5, ge=0.5, lt=1)
    """Pairs in which the probability of the better completion is below this are ties, and left out."""


class RLAIFConfig(Frozen):
    """Reinforcement learning from a judge's feedback (arXiv:2212.08073, arXiv:2309.00267), in stages."""

    on_resume = OnResume.REFUSED
    takes_rewards: ClassVar[Literal["none"]] = "none"
    measures: ClassVar[Literal["accuracy"]] = "accuracy"
    type: Literal["rlaif"] = "rlaif"
    output_dir: MayChange[Path] = Path("runs/alignlab")
    seed: int = Field(0, ge=0, lt=2**32)
    constitution: Recorded[str]
    """A YAML file of principles, see `configs/constitutions`."""
    judge: AnyJudge
    path: FeedbackPath
    """revision: critique and revision alone. dpo: labelled pairs. reward_model: a reward model of labelled pairs.
    direct: the judge's rating of each completion is its reward. online_dpo: the judge compares the policy's pairs as
    they come."""
    revision: RevisionSettings | None = None
    """First stage, where it is given."""
    labels: LabelSettings | None = None
    reward: RewardConfig | None = None
    policy: Annotated[GRPOConfig | PPOConfig | DPOConfig | OnlineDPOConfig, Field(discriminator="type")] | None = None
    """The trainer of the last stage."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        filled = dict(raw)
        if "judge" in filled:
            filled["judge"] = fill_judge(filled["judge"])
        path = filled.get("path")
        if path in LABELLED and "labels" not in filled:
            filled["labels"] = {}
        if path == "reward_model" and "reward" not in filled:
            filled["reward"] = {}
        if path == "revision" and "revision" not in filled:
            filled["revision"] = {}
        return filled

    _at_home = field_validator("constitution")(at_home)

    @field_validator("output_dir")
    @classmethod
    def _expand_home(cls, path: Path) -> Path:
        return with_home(path)

    @model_validator(mode="after")
    def _check(self) -> Self:
        has_stage = {"labels": self.path in LABELLED, "reward": self.path == "reward_model"}
        for name, is_stage in has_stage.items():
            if getattr(self, name) is not None and not is_stage:
                must = f"be left out with path {self.path}, which has no such stage"
                raise BrokenRule(name, "given", must, "remove it")
        self._check_policy()
        self._check_folders()
        self._check_numerics()
        self._check_sharding()
        return self

    def _check_numerics(self) -> None:
        """All stages run in one process, whose numerics are fixed when CUDA starts."""
        for name, stage in self._named_stages().items():
            if stage.numerics != self.numerics:
                must = f"be the last stage's ({self.numerics}): all stages run in one process"
                raise BrokenRule(f"{name}.numerics", str(stage.numerics), must, "write the same in each stage")

    def _check_sharding(self) -> None:
        """The ranks of a run are those of each stage."""
        for name, stage in self._named_stages().items():
            if stage.sharding != self.sharding:
                must = f"be the last stage's ({self.sharding}): all stages run on the same ranks"
                raise BrokenRule(f"{name}.sharding", str(stage.sharding), must, "write the same in each stage")

    def _named_stages(self) -> dict[str, TrainerConfig]:
        """Return the trainers that run, by the names of their sections."""
        revision = self.revision.trainer if self.revision else None
        stages = {"revision.trainer": revision, "reward": self.reward, "policy": self.policy}
        return {name: stage for name, stage in stages.items() if stage is not None}

    def _check_policy(self) -> None:
        if self.revision is not None and self.judge.backend == "reward_model":
            must = "be model or endpoint with revision: a reward model writes no critiques"
            raise BrokenRule("judge.backend", self.judge.backend, must, "use another judge, or remove revision")
        allowed, kind = POLICIES[self.path], self.policy and self.policy.type
        if allowed and kind not in allowed:
            must = f"be given, of type {' or '.join(allowed)}, with path {self.path}"
            raise BrokenRule("policy.type", kind, must, f"use policy: {{type: {allowed[0]}}}")
        if not allowed and kind is not None:
            raise BrokenRule("policy", kind, f"be left out with path {self.path}, which ends before", "remove it")

    def _check_folders(self) -> None:
        for name, stage in self._named_stages().items():
            for field, must in _OF_THE_RUN.items():
                info = type(stage).model_fields.get(field)
                value = getattr(stage, field, None)
                if info is not None and value != info.default:
                    raise BrokenRule(f"{name}.{field}", str(value), must, "remove it")

    @property
    def method(self) -> str:
        """Short description of the method, for reports."""
        return f"rlaif ({self.path}, judge: {self.judge.backend})"

    @property
    def step(self) -> str:
        """Short description of the stages, for reports."""
        return "; ".join(f"{stage.method}, {stage.num_steps} steps, {stage.step}" for stage in self.stages)

    @property
    def numerics(self) -> NumericsSettings:
        """The precision and the order of what a GPU computes, in all stages."""
        return self.stages[-1].numerics

    @property
    def sharding(self) -> ShardingSettings:
        """Where the weights in training live, in all stages."""
        return self.stages[-1].sharding

    @property
    def sampling_stages(self) -> tuple[RevisionSettings | LabelSettings | OnlineConfig, ...]:
        """The stages in which the policy samples completions of the prompts, in order."""
        stages = (self.revision, self.labels, self.policy if isinstance(self.policy, OnlineConfig) else None)
        return tuple(stage for stage in stages if stage is not None)

    @property
    def stages(self) -> tuple[TrainerConfig, ...]:
        """The trainers that run, in order."""
        return tuple(self._named_stages().values())
