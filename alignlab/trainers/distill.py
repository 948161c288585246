"""The trainer of offline distillation, which measures its student by held-out accuracy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from alignlab.config.data import RenderSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import DistillConfig
from alignlab.evaluation.results import EvaluationResult
from alignlab.loop.given_data import DatasetLike, given_data, given_held_out
from alignlab.loop.held_out import held_out_problems
from alignlab.loop.inputs import Model, Reward, resolve_rewards
from alignlab.loop.offline import OfflineTrainer
from alignlab.loop.preflight import Preflight
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.trainers.distill_algorithm import Distill


class DistillTrainer(OfflineTrainer):
    """Trainer of offline distillation, on completions as `SFTTrainer` reads them; other arguments are its.

    Args:
        eval_dataset: prompts, as an `OnlineTrainer` reads them, on which the student's accuracy is measured.
        reward_funcs: the first one's value 1 means a right answer; nothing is learnt from it.
        evaluation: how accuracy is measured.

    Raises:
        ConfigError: the teacher does not fit the student; or accuracy is to be measured, and nothing says what is
            right.
    """

    config: DistillConfig
    algorithm: Distill
    algorithm_class = Distill
    size_field = "num_sequences"

    def __init__(
        self,
        model: Model,
        config: DistillConfig,
        train_dataset: Any,
        *,
        eval_dataset: DatasetLike | None = None,
        render_settings: RenderSettings | None = None,
        eval_render_settings: RenderSettings | None = None,
        reward_funcs: Reward | Sequence[Reward] = (),
        evaluation: EvaluationSettings | None = None,
        **options: Any,
    ) -> None:
        rewards = resolve_rewards(reward_funcs) if reward_funcs else []
        problems = held_out_problems(
            evaluation, rewards, SamplingSettings(), RolloutSettings(), needed=eval_dataset is not None
        )
        train = given_data(train_dataset, render_settings)
        held_out = given_held_out(eval_dataset, eval_render_settings, train)
        super().__init__(model, config, train, **options)
        self.held_out = problems.read(held_out, self.learner.model, self.tokenizer)
        self.identity.add_held_out(self.held_out.prompts, self.held_out.settings, train, held_out)

    def contents(self) -> Preflight:
        """Return the examples, the held-out prompts, the scorer and the teacher."""
        return replace(super().contents(), held_out=self.held_out.prompts, scorer=self.held_out.scorer)

    @property
    def has_held_out(self) -> bool:
        """Whether there are held-out prompts."""
        return bool(self.held_out)

    def evaluate(self) -> EvaluationResult | None:
        """Return greedy and sampled accuracy on the held-out prompts."""
        if not self.held_out:
            return None
        engine = EmbeddedEngine(self.learner.model, self.tokenizer, RolloutSettings())
        return self.held_out.evaluate(engine, self.ranks, seed=self.config.seed)
