"""The stage that trains a reward model on the labelled pairs; `reward/` is its run."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from alignlab.config.trainers import RewardConfig
from alignlab.runs.folder import output_of_run
from alignlab.trainers.reward import RewardTrainer
from alignlab.trainers.rlaif.stage import Progress, StageContext


class RewardStage:
    """A reward model, by which the last stage rewards completions."""

    name = "reward"

    def __init__(self, context: StageContext, config: RewardConfig) -> None:
        self._context, self._config = context, config

    @property
    def folder(self) -> Path:
        """The stage's folder, which is its run's."""
        return self._context.folder / self.name

    def finished(self) -> bool:
        """Return whether the reward model is saved."""
        return output_of_run(self.folder) is not None

    def run(self, progress: Progress) -> Progress:
        """Train the reward model on the labels' probabilities; see `Stage.run`."""
        context = self._context
        trainer = RewardTrainer(
            copy.deepcopy(progress.policy),
            context.stage_config(self._config, self.folder, probability_column="probability"),
            progress.preferences,
            tokenizer=context.tokenizer,
            peft_config=context.peft_config,
            callbacks=context.callbacks,
            render_settings=context.render_settings,
        )
        return replace(progress, reward_model=context.train(trainer, "reward").model_path)
