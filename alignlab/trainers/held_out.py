"""Held-out problems of a trainer, and the reward that says which completions of them are right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.render import RenderSettings
from alignlab.config.rewards import RewardSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings, VLLMServerSettings, VLLMSettings
from alignlab.config.run import EvaluationSettings
from alignlab.errors import ConfigError
from alignlab.trainers.given_data import GivenData, resolve_prompts
from alignlab.trainers.preflight import check_prompt_ids, with_room
from alignlab.training.evaluation import EvaluationResult, evaluate
from alignlab.training.reward_functions import LoadedReward, load_reward
from alignlab.types import Prompt, RolloutEngine


@dataclass(frozen=True)
class HeldOutProblems:
    """What accuracy is measured on, and how.

    Attributes:
        prompts: none where there is no held-out data.
        scorer: its value 1 means a right answer; None where nothing says what is right.
        settings: of the evaluation.
        sampling: of the sampled pass.
        rollout: the engine's settings.
    """

    prompts: Sequence[Prompt]
    scorer: LoadedReward | None
    settings: EvaluationSettings
    sampling: SamplingSettings
    rollout: RolloutSettings | VLLMSettings | VLLMServerSettings

    def __bool__(self) -> bool:
        return bool(self.prompts)

    def read(self, data: GivenData | None, model: Any, tokenizer: PreTrainedTokenizerBase) -> HeldOutProblems:
        """Return the same with the prompts of a dataset, all of which the model can read and complete.

        Raises:
            ConfigError, DataError: they cannot be read, or one that is asked has no room for its completion.
        """
        if data is None:
            return self
        return self.of(resolve_prompts(data, tokenizer), data.settings, model, tokenizer)

    def of(
        self, prompts: Sequence[Prompt], settings: RenderSettings, model: Any, tokenizer: PreTrainedTokenizerBase
    ) -> HeldOutProblems:
        """Return the same with prompts that were read by these settings; see `read`."""
        check_prompt_ids(model, prompts, tokenizer)
        asked = prompts if settings.on_bad_row == "skip" else prompts[: self.settings.num_problems]
        fit = with_room(asked, model, self, settings, tokenizer=tokenizer, what="evaluation prompt")
        return replace(self, prompts=fit)

    def evaluate(self, engine: RolloutEngine, *, seed: int) -> EvaluationResult | None:
        """Return greedy and sampled accuracy; None without problems, or without a scorer."""
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
        )


def held_out_problems(
    settings: EvaluationSettings | None, rewards: Sequence[LoadedReward], sampling: SamplingSettings,
    rollout: RolloutSettings | VLLMSettings | VLLMServerSettings, *, needed: bool,
) -> HeldOutProblems:
    """Return how held-out problems are measured, without any: they are read by `HeldOutProblems.read`.

    Args:
        sampling: the trainer's; its temperature is 1 in the sampled pass, unless `settings.sampled` says otherwise.

    Raises:
        ConfigError: `needed`, for there is held-out data, and nothing says what is right.
    """
    settings = settings or EvaluationSettings()
    sampled = settings.sampled or sampling.model_copy(update={"temperature": 1.0})
    return HeldOutProblems((), _choose_scorer(settings, rewards, needed=needed), settings, sampled, rollout)


def _choose_scorer(
    settings: EvaluationSettings, rewards: Sequence[LoadedReward], *, needed: bool
) -> LoadedReward | None:
    """Return `evaluation.scorer` or, without one, the first of the rewards."""
    if settings.scorer is not None:
        return load_reward(RewardSettings(name=settings.scorer))
    if rewards:
        return rewards[0]
    if needed:
        raise ConfigError(
            "eval_dataset is given, and must be left out where nothing says what is right; give reward_funcs or "
            "evaluation.scorer, such as reasoning_gym_answer"
        )
    return None
