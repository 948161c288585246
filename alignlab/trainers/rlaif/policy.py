"""The last stage: training the policy on labelled pairs, with a reward model, or with the judge itself."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

from alignlab.config.trainers import DPOConfig, GRPOConfig, OnlineDPOConfig, PPOConfig, TrainerConfig
from alignlab.loop.inputs import resolve_model
from alignlab.loop.online import OnlineTrainer
from alignlab.loop.rank_agreement import json_of_ranks
from alignlab.runs.folder import output_of_run
from alignlab.scoring.judges.judge_rewards import JudgeReward, RatingReward, WinReward
from alignlab.scoring.reward_model import ModelReward
from alignlab.trainers.dpo import DPOTrainer
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.online_dpo import OnlineDPOTrainer
from alignlab.trainers.ppo import PPOTrainer
from alignlab.trainers.rlaif.stage import Progress, StageContext

_ONLINE: dict[type[TrainerConfig], type[OnlineTrainer]] = {
    GRPOConfig: GRPOTrainer, PPOConfig: PPOTrainer, OnlineDPOConfig: OnlineDPOTrainer,
}  # fmt: skip


class PolicyStage:
    """The policy's training; `policy/` is its run."""

    name = "policy"

    def __init__(self, context: StageContext, config: TrainerConfig) -> None:
        self._context, self._config = context, config

    @property
    def folder(self) -> Path:
        """The stage's folder, which is its run's."""
        return self._context.folder / self.name

    def finished(self) -> bool:
        """Return whether the trained policy is saved."""
        return output_of_run(self.folder) is not None

    def run(self, progress: Progress) -> Progress:
        """Train the policy; see `Stage.run`."""
        context = self._context
        # Ranks ask the judge different numbers of questions, and so cannot gather weights that are spread together.
        is_copied = context.judge_is_base and self._config.sharding.spreads_training
        judging = copy.deepcopy(progress.policy).requires_grad_(False) if is_copied else None
        set_seed(self._context.config.seed)  # a new adapter begins alike on all ranks, whatever these have drawn before
        policy, _ = resolve_model(
            progress.policy, context.tokenizer, context.peft_config, context.accelerator.device
        )
        if isinstance(self._config, DPOConfig):
            trainer: Any = self._dpo_trainer(self._config, policy, progress)
            reward = None
        else:
            reward = self._reward(policy if judging is None else judging, progress.reward_model)
            trainer = _ONLINE[type(self._config)](
                policy, reward, context.stage_config(self._config, self.folder), context.prompts,
                tokenizer=context.tokenizer, callbacks=context.callbacks,
            )  # fmt: skip
        result = context.train(trainer, "policy")
        if isinstance(reward, JudgeReward):
            counts_of_ranks = json_of_ranks(context.accelerator, reward.counts)
            context.questions += sum(map(Counter, counts_of_ranks), Counter())
        return replace(progress, policy=trainer.learner.model, result=result)

    def _dpo_trainer(self, config: DPOConfig, policy: Any, progress: Progress) -> DPOTrainer:
        context = self._context
        # The sigmoid loss takes soft labels; the others, and label smoothing, take hard ones.
        is_soft = config.loss == "sigmoid" and not config.label_smoothing
        section = context.stage_config(config, self.folder, probability_column="probability" if is_soft else None)
        return DPOTrainer(
            policy, section, progress.preferences, tokenizer=context.tokenizer, callbacks=context.callbacks,
            render_settings=context.render_settings,
        )  # fmt: skip

    def _reward(self, base: Any, reward_model: Path | None) -> ModelReward | JudgeReward:
        """Return the reward of online training: the trained reward model, or the judge.

        Args:
            base: judges where the judge is the policy's base; the policy, or a copy of its base.
        """
        if reward_model is not None:
            return ModelReward(str(reward_model))
        context = self._context
        judge = context.judge_beside(base)
        work = context.run_name and f"{context.run_name}/policy/{context.accelerator.process_index}"
        return WinReward(judge, work=work) if context.config.path == "online_dpo" else RatingReward(judge, work=work)
