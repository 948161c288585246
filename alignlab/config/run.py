"""A whole run, as a YAML file describes it."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from alignlab.config.base import Frozen, MayChange, OnResume, at_home
from alignlab.config.data import DataSettings
from alignlab.config.error_messages import BrokenRule
from alignlab.config.judge import ModelJudge
from alignlab.config.model import ModelSettings
from alignlab.config.rewards import RewardSettings
from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainer import NumericsSettings
from alignlab.config.trainers import (
    AnyTrainer,
    OnlineConfig,
    OnPolicyDistillConfig,
    PPOConfig,
    RLAIFConfig,
    SFTConfig,
    stages_of,
)


class EvaluationSettings(Frozen):
    """Measuring of held-out accuracy: greedy, and sampled, at temperature 1 unless `sampled` sets another."""

    on_resume = OnResume.REFUSED
    num_problems: int | None = Field(None, ge=1)
    """Default: all of the evaluation data."""
    num_samples: int = Field(4, ge=1)
    """Sampled completions a problem."""
    pass_at: tuple[int, ...] = (1,)
    """The k of pass@k, each at most num_samples."""
    sampled: SamplingSettings | None = None
    """Default, and default of each of its fields: the trainer's sampling at temperature 1."""
    scorer: str | None = None
    """The reward function whose value 1 means a correct answer; default: the first of `rewards`."""
    scorer_run_in: MayChange[Literal["thread", "process"]] = "thread"
    """Where `scorer` runs, as `run_in` of a reward: one that exits, crashes, hangs, prints or fills memory does no harm
    in a process of its own. The first of `rewards` runs where it says itself."""
    scorer_memory_limit_gib: MayChange[float | None] = Field(None, gt=0)
    """Of a process of the scorer's own: the memory that it may allocate. Default: 4."""
    scorer_time_limit_s: MayChange[float] = Field(300.0, gt=0)
    """For one call of the scorer on all completions of a pass, greedy or sampled."""

    _at_home = field_validator("scorer")(at_home)

    @property
    def scorer_settings(self) -> RewardSettings | None:
        """The settings of `scorer`, with the place where it runs; None if none is named."""
        if self.scorer is None:
            return None
        return RewardSettings(
            name=self.scorer, run_in=self.scorer_run_in, memory_limit_gib=self.scorer_memory_limit_gib
        )

    @model_validator(mode="after")
    def _check_scorer(self) -> Self:
        if self.scorer is None and self.scorer_run_in != "thread":
            must = "be left out where no scorer is named: the first of rewards runs where its own run_in says"
            raise BrokenRule("scorer_run_in", self.scorer_run_in, must, "name the scorer, or remove it")
        if self.scorer_memory_limit_gib is not None and self.scorer_run_in == "thread":
            must = "stay null where the scorer runs in a thread, which shares the training's memory"
            fix = "add scorer_run_in: process, or remove it"
            raise BrokenRule("scorer_memory_limit_gib", self.scorer_memory_limit_gib, must, fix)
        return self

    @model_validator(mode="after")
    def _check(self) -> Self:
        impossible = [k for k in self.pass_at if not 1 <= k <= self.num_samples]
        if impossible:
            must = f"hold numbers from 1 to num_samples ({self.num_samples}) only"
            fix = f"remove {impossible[0]}, or use num_samples {max(impossible)}"
            raise BrokenRule("pass_at", list(self.pass_at), must, fix)
        return self


class WarmStart(Frozen):
    """Supervised fine-tuning before reinforcement learning, on the training data's prompts and answers."""

    on_resume = OnResume.REFUSED
    trainer: SFTConfig = SFTConfig()
    data: DataSettings | None = None
    """Default: the run's training data."""
    answer_column: str = "answer"
    answer_template: str = "{answer}"

    @model_validator(mode="after")
    def _check(self) -> Self:
        if "{answer}" not in self.answer_template:
            raise BrokenRule("answer_template", self.answer_template, "contain {answer}", 'use "{answer}"')
        self.refuse_unread("trainer.early_stopping", "in a warm start, where nothing is measured")
        self.refuse_unread("trainer.eval_every_steps", "in a warm start, where nothing is measured")
        return self


class RunConfig(Frozen):
    """A run from one file."""

    on_resume = OnResume.REFUSED
    model: ModelSettings
    data: DataSettings
    eval_data: DataSettings | None = None
    """Default for a task: the same task, split "eval"."""
    rewards: tuple[RewardSettings, ...] = ()
    trainer: AnyTrainer
    evaluation: EvaluationSettings = EvaluationSettings()
    warm_start: WarmStart | None = None

    @property
    def has_scorer(self) -> bool:
        """True if a function decides which answers are correct."""
        return self.scorer is not None

    @property
    def online_stage(self) -> OnlineConfig | None:
        """The last training, if it learns from rollouts."""
        last = stages_of(self.trainer)[-1]
        return last if isinstance(last, OnlineConfig) else None

    @property
    def scorer(self) -> RewardSettings | None:
        """The reward function that decides which answers are correct, if any."""
        settings = self.evaluation.scorer_settings
        return self.rewards[0] if settings is None and self.rewards else settings

    @property
    def evaluation_data(self) -> DataSettings | None:
        """The held-out data: as given, or the questions of the same task that training never sees."""
        if self.eval_data is not None or self.data.task is None:
            return self.eval_data
        return self.data.model_copy(update={"split": "eval"})

    @property
    def measured_data(self) -> DataSettings | None:
        """The held-out data of the trainer; None where it can measure nothing on it."""
        unscored = self.trainer.takes_rewards == "optional" and self.trainer.measures == "accuracy"
        return None if unscored and not self.has_scorer else self.evaluation_data

    @model_validator(mode="before")
    @classmethod
    def _fill_sampled(cls, raw: Any) -> Any:
        """Fill fields that `evaluation.sampled` leaves out with the training's sampling."""
        if not isinstance(raw, dict):
            return raw
        evaluation, trainer = raw.get("evaluation"), raw.get("trainer")
        sampled = evaluation.get("sampled") if isinstance(evaluation, dict) else None
        trained = trainer.get("sampling") if isinstance(trainer, dict) else None
        if not (isinstance(evaluation, dict) and isinstance(sampled, dict) and isinstance(trained, dict)):
            return raw
        return raw | {"evaluation": evaluation | {"sampled": trained | {"temperature": 1.0} | sampled}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_warm_start()
        self._check_data()
        self._check_critic()
        self._check_judge()
        self._check_rewards()
        self._check_without_rewards()
        self._check_scorer()
        self._check_early_stopping()
        return self

    def _check_warm_start(self) -> None:
        if self.warm_start is not None and isinstance(self.trainer, SFTConfig):
            raise BrokenRule("warm_start", "given", "be null before supervised fine-tuning", "remove it")
        if self.warm_start is not None:
            self.refuse_unread("warm_start.trainer.output_dir", "for a warm start, which is in trainer.output_dir")
            if self.warm_start.trainer.ema is not None:
                self.warm_start.trainer.ema.check_sharding(self.trainer.sharding, "warm_start.trainer.ema")
            self._check_warm_start_numerics(self.warm_start.trainer.numerics)

    def _check_warm_start_numerics(self, given: NumericsSettings) -> None:
        """The warm start runs in the training's process, whose numerics are fixed when CUDA starts."""
        if given not in (NumericsSettings(), self.trainer.numerics):
            must = "be left out: a warm start computes as trainer.numerics says"
            raise BrokenRule("warm_start.trainer.numerics", str(given), must, "write it in trainer.numerics")

    def _check_data(self) -> None:
        for name, data in (("data", self.data), ("eval_data", self.eval_data)):
            if data is not None and data.path is None and data.task is None:
                raise BrokenRule(f"{name}.path", None, "be given where there is no task", "give a path or a task")
        if self.trainer.type not in ("sft", "distill") and not self.warm_start:
            because = f"for trainer {self.trainer.type}, which teaches no turns of a conversation"
            self.refuse_unread("data.taught_turns", because)
        self._check_disjoint("data", self.data)
        if self.warm_start is not None and self.warm_start.data is not None:
            self._check_disjoint("warm_start.data", self.warm_start.data)

    def _check_disjoint(self, name: str, trained_on: DataSettings) -> None:
        """A task's questions are divided by `split` and `eval_frac`: evaluation must be on the other side."""
        held_out = self.eval_data or self.data.model_copy(update={"split": "eval"})
        if held_out.task is None or held_out.task != trained_on.task:
            return
        if held_out.split == trained_on.split:
            must = "not be the split that accuracy is measured on"
            raise BrokenRule(f"{name}.split", trained_on.split, must, "use train, and eval for eval_data")
        if held_out.eval_frac != trained_on.eval_frac:
            must = f"be the evaluation data's ({held_out.eval_frac}): it decides which questions are trained on"
            raise BrokenRule(f"{name}.eval_frac", trained_on.eval_frac, must, f"use {held_out.eval_frac}")

    def _check_critic(self) -> None:
        """A model by name may be an adapter's folder, and is looked at when it is loaded."""
        trainer = self.trainer.policy if isinstance(self.trainer, RLAIFConfig) else self.trainer
        form = trainer.critic.form if isinstance(trainer, PPOConfig) else "model"
        if form != "model" and self.model.architecture is not None:
            must = "be model for a new model, all of whose weights train: the others share an adapter's frozen base"
            raise BrokenRule("trainer.critic.form", form, must, "use model")

    def _check_judge(self) -> None:
        judge = self.trainer.judge if isinstance(self.trainer, RLAIFConfig) else None
        if isinstance(judge, ModelJudge) and judge.name is None and self.model.lora is None:
            must = "be given where the policy's own base judges (no trainer.judge.name): all weights would be trained"
            raise BrokenRule("model.lora", None, must, "use lora: {rank: 16}, or name a judge")

    def _check_without_rewards(self) -> None:
        """Refuse settings that need a reward where there is none."""
        if self.rewards:
            return
        weight = self.trainer.task_weight if isinstance(self.trainer, OnPolicyDistillConfig) else 0.0
        if weight > 0:
            must = "be 0 where there are no rewards"
            raise BrokenRule("trainer.task_weight", weight, must, "name one in rewards, or remove it")

    def _check_rewards(self) -> None:
        if self.trainer.takes_rewards == "none" and self.rewards:
            must = f"be empty for trainer {self.trainer.type}, which reads none"
            raise BrokenRule("rewards", [reward.name for reward in self.rewards], must, "remove them")
        metrics = {"preferences": "how often the chosen one leads", "labels": "how often labels are agreed with"}
        if self.trainer.measures in metrics and self.evaluation != EvaluationSettings():
            must = f"be left out for learning from preferences: the metric is {metrics[self.trainer.measures]}"
            raise BrokenRule("evaluation", "given", must, "remove it; the size of eval_data sets the number of rows")
        if self.trainer.takes_rewards == "needed" and not self.rewards:
            must = "name at least one reward function for reinforcement learning"
            raise BrokenRule("rewards", [], must, "use [{name: reasoning_gym_answer}] for a task, or your own")

    def _check_early_stopping(self) -> None:
        """Python arguments are checked by the trainer, which knows its held-out data."""
        if isinstance(self.trainer, RLAIFConfig) or self.trainer.early_stopping is None or self.measured_data:
            return
        must = "be given with trainer.early_stopping, which goes by held-out data"
        fix = "give eval_data with what decides which answers are right, or remove early_stopping"
        raise BrokenRule("eval_data", None, must, fix if self.trainer.measures == "accuracy" else "give eval_data")

    def _check_scorer(self) -> None:
        if self.eval_data is not None and self.trainer.measures == "accuracy" and not self.has_scorer:
            must = "be null where nothing decides which answers are correct"
            raise BrokenRule("eval_data", "given", must, "name a reward or evaluation.scorer, or remove it")
