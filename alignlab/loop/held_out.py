"""Held-out problems of a trainer, and the scorer that decides which answers are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.config.rollout import EngineSettings, SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.errors import ConfigError
from alignlab.evaluation.evaluate import check_problems, evaluate
from alignlab.evaluation.results import EvaluationResult
from alignlab.loop.given_data import GivenData, resolve_prompts
from alignlab.loop.preflight import check_prompt_ids, with_room
from alignlab.loop.ranks import Ranks
from alignlab.rollout.engine import RolloutEngine
from alignlab.scoring.loading import LoadedReward, load_reward
from alignlab.types import Prompt


@dataclass(frozen=True)
class HeldOutProblems:
    """Problems on which accuracy is measured, and the settings of the measurement.

    Attributes:
        prompts: the problems; empty without held-out data.
        scorer: gives 1 for a right answer; None where no scorer is set.
        settings: settings of the evaluation.
        sampling: settings of the sampled pass.
        rollout: settings of the engine.
    """

    prompts: Sequence[Prompt]
    scorer: LoadedReward | None
    settings: EvaluationSettings
    sampling: SamplingSettings
    rollout: EngineSettings

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def read(self, data: GivenData | None, model: Any, tokenizer: PreTrainedTokenizerBase) -> HeldOutProblems:
        """Return these problems with the prompts of a dataset, which the model must be able to read and complete.

        Raises:
            ConfigError, DataError: the prompts cannot be read, or one has no room for its completion.
        """
        if data is None:
            return self
        return self.of(resolve_prompts(data, tokenizer), data.settings, model, tokenizer)

    def of(
        self, prompts: Sequence[Prompt], settings: RenderSettings, model: Any, tokenizer: PreTrainedTokenizerBase
    ) -> HeldOutProblems:
        """Return these problems with prompts that `settings` have rendered; see `read`."""
        check_prompt_ids(model, prompts, tokenizer)
        needed = prompts if settings.on_bad_row == "skip" else prompts[: self.settings.num_problems]
        fit = with_room(needed, model, self, settings, tokenizer=tokenizer, what="evaluation prompt")
        if self.scorer is not None:
            check_problems(fit, self.scorer, self.settings.pass_at, self.settings.num_samples)
        return replace(self, prompts=fit)

    def evaluate(self, engine: RolloutEngine, ranks: Ranks | None = None, *, seed: int) -> EvaluationResult | None:
        """Return greedy and sampled accuracy; None without problems, or without a scorer.

        Args:
            engine: of this rank.
            ranks: share the problems, and call this together; default: this process measures all.
        """
        if not self.prompts or self.scorer is None:
            return None
        return evaluate(
            engine,
            self.prompts[: self.settings.num_problems],
            self.scorer,
            sampling=self.sampling,
            num_samples=self.settings.num_samples,
            seed=seed,
            pass_at=self.settings.pass_at,
            time_limit_s=self.settings.scorer_time_limit_s,
            ranks=ranks,
        )


def held_out_problems(
    settings: EvaluationSettings | None, rewards: Sequence[LoadedReward], sampling: SamplingSettings,
    rollout: EngineSettings, *, needed: bool,
) -> HeldOutProblems:
    """Return scorer and settings of the evaluation, without problems: `HeldOutProblems.read` adds them.

    Args:
        sampling: the trainer's; its temperature is 1 in the sampled pass, unless `settings.sampled` says otherwise.

    Raises:
        ConfigError: `needed`, since there is held-out data, and neither a scorer nor a reward is set.
    """
    settings = settings or EvaluationSettings()
    sampled = settings.sampled or sampling.model_copy(update={"temperature": 1.0})
    return HeldOutProblems((), _choose_scorer(settings, rewards, needed=needed), settings, sampled, rollout)


def _choose_scorer(
    settings: EvaluationSettings, rewards: Sequence[LoadedReward], *, needed: bool
) -> LoadedReward | None:
    """Return `evaluation.scorer` or, without one, the first of the rewards."""
    named = settings.scorer_settings
    if named is not None:
        return load_reward(named)
    if rewards:
        return rewards[0]
    if needed:
        raise ConfigError(
            "eval_dataset is given, and must be left out where no scorer decides which answers are right; give "
            "reward_funcs or evaluation.scorer, such as reasoning_gym_answer"
        )
    return None
