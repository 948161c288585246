"""A whole run: what a YAML file says."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator

from alignlab.config.base import Frozen
from alignlab.config.data import DataSettings
from alignlab.config.judge import ModelJudge
from alignlab.config.messages import BrokenRule
from alignlab.config.model import ModelSettings
from alignlab.config.on_resume import OnResume
from alignlab.config.rewards import RewardSettings
from alignlab.config.rollout import SamplingSettings
from alignlab.config.trainers import AnyTrainer, OnPolicyDistillConfig, PPOConfig, RLAIFConfig, SFTConfig


class EvaluationSettings(Frozen):
    """How held-out accuracy is measured: greedy, and sampled at temperature 1 unless `sampled` says otherwise."""

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
    """The reward function whose value 1 means a right answer; default: the first of `rewards`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        wrong = [k for k in self.pass_at if not 1 <= k <= self.num_samples]
        if wrong:
            must = f"hold numbers from 1 to num_samples ({self.num_samples}) only"
            raise BrokenRule("pass_at", list(self.pass_at), must, f"remove {wrong[0]}, or use num_samples {max(wrong)}")
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
        if self.trainer.eval_every_steps is not None:
            must = "be null: nothing is measured in a warm start"
            raise BrokenRule("trainer.eval_every_steps", self.trainer.eval_every_steps, must, "remove it")
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
        """Whether something says which completions are right."""
        return bool(self.rewards) or self.evaluation.scorer is not None

    @model_validator(mode="before")
    @classmethod
    def _fill_sampled(cls, given: Any) -> Any:
        """What `evaluation.sampled` leaves out is as in training."""
        if not isinstance(given, dict):
            return given
        evaluation, trainer = given.get("evaluation"), given.get("trainer")
        sampled = evaluation.get("sampled") if isinstance(evaluation, dict) else None
        trained = trainer.get("sampling") if isinstance(trainer, dict) else None
        if not (isinstance(evaluation, dict) and isinstance(sampled, dict) and isinstance(trained, dict)):
            return given
        return given | {"evaluation": evaluation | {"sampled": trained | {"temperature": 1.0} | sampled}}

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_warm_start()
        self._check_data()
        self._check_critic()
        self._check_judge()
        self._check_rewards()
        self._check_without_rewards()
        self._check_scorer()
        return self

    def _check_warm_start(self) -> None:
        if self.warm_start is not None and isinstance(self.trainer, SFTConfig):
            raise BrokenRule("warm_start", "given", "be null before supervised fine-tuning", "remove it")
        default = SFTConfig.model_fields["output_dir"].default
        if self.warm_start is not None and self.warm_start.trainer.output_dir != default:
            given, must = str(self.warm_start.trainer.output_dir), "be left out: a warm start is in trainer.output_dir"
            raise BrokenRule("warm_start.trainer.output_dir", given, must, "remove it")

    def _check_data(self) -> None:
        for name, data in (("data", self.data), ("eval_data", self.eval_data)):
            if data is not None and data.path is None and data.task is None:
                raise BrokenRule(f"{name}.path", None, "be given where there is no task", "give a path or a task")
        if self.data.taught_turns != "together" and self.trainer.type not in ("sft", "distill") and not self.warm_start:
            must = f"stay together for trainer {self.trainer.type}, which teaches no turns of a conversation"
            raise BrokenRule("data.taught_turns", self.data.taught_turns, must, "remove it")
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
        """What needs a reward where a trainer does not."""
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
        told = {"preferences": "how often the chosen one leads", "labels": "how often labels are agreed with"}
        if self.trainer.measures in told and self.evaluation != EvaluationSettings():
            must = f"be left out for learning from preferences: what is measured is {told[self.trainer.measures]}"
            raise BrokenRule("evaluation", "given", must, "remove it; size of eval_data says on how many rows")
        if self.trainer.takes_rewards == "needed" and not self.rewards:
            must = "name at least one reward function for reinforcement learning"
            raise BrokenRule("rewards", [], must, "use [{name: reasoning_gym_answer}] for a task, or your own")

    def _check_scorer(self) -> None:
        if self.eval_data is not None and self.trainer.measures == "accuracy" and not self.has_scorer:
            must = "be null where nothing says what is right"
            raise BrokenRule("eval_data", "given", must, "name a reward or evaluation.scorer, or remove it")
