"""What is looked at before a training from rollouts begins."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignlab.config.rewards import RewardSettings
from alignlab.config.rollout import RolloutSettings, SamplingSettings
from alignlab.config.run import EvaluationSettings
from alignlab.config.trainers import OnlineConfig
from alignlab.data.vocabulary import check_ids
from alignlab.errors import ConfigError
from alignlab.models.attention import num_embeddings, num_positions
from alignlab.training.reward_functions import LoadedReward, load_reward
from alignlab.types import Prompt

logger = logging.getLogger(__name__)
TRUNCATES = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0, "min_new_tokens": 0}
"""Settings that change the distribution sampled from, and where they do not."""


def check_room(
    model: Any, prompts: Sequence[Prompt], config: OnlineConfig, *, whose: str = "the model",
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> None:
    """Raise if the model cannot read the prompts, or the longest leaves no room for its completion, in the model or in
    the engine.

    Args:
        tokenizer: names a token that the model has no embedding for.

    Raises:
        ConfigError: with the value that fits.
    """
    check_prompt_ids(model, prompts, tokenizer, whose=whose)
    positions = num_positions(model)
    served = None if isinstance(config.rollout, RolloutSettings) else config.rollout.context_tokens
    longest = max((len(prompt.token_ids) for prompt in prompts), default=0)
    wanted = config.sampling.max_new_tokens
    for limit, named in ((positions, f"{whose}'s {{}} positions"), (served, "rollout.context_tokens ({})")):
        if limit is not None and longest + wanted > limit:
            room = limit - longest
            fix = f"use {room} or less, or lower" if room > 0 else "lower"
            raise ConfigError(
                f"sampling.max_new_tokens is {wanted}, and with the longest prompt ({longest} tokens) must fit "
                f"{named.format(limit)}; {fix} max_prompt_tokens of the data"
            )


def check_prompt_ids(
    model: Any, prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase | None, *, whose: str = "the model"
) -> None:
    """Raise if a prompt holds a token that the model has no embedding for.

    Raises:
        ConfigError: with the prompt's number and the token.
    """
    check_ids(((prompt.token_ids,) for prompt in prompts), {whose: num_embeddings(model)}, tokenizer, what="prompt")


def warn_of_truncation(sampling: SamplingSettings) -> None:
    """Say so where completions are not drawn from the distribution that is trained."""
    truncating = [
        name
        for name, off in TRUNCATES.items()
        if getattr(sampling, name) != off
    ]
    if truncating:
        logger.warning(
            "sampling.%s changes the distribution that rollouts are drawn from, and the loss is of the whole one: "
            "the gradient is biased and rollout_gap is large by construction; leave it out, unless that is meant",
            ", sampling.".join(truncating),
        )


def choose_scorer(
    evaluation: EvaluationSettings, rewards: Sequence[LoadedReward], *, needed: bool
) -> LoadedReward | None:
    """What says which completions are right: `evaluation.scorer` or, without one, the first of the rewards.

    Raises:
        ConfigError: it is needed, for there is held-out data, and there is none.
    """
    if evaluation.scorer is not None:
        return load_reward(RewardSettings(name=evaluation.scorer))
    if rewards:
        return rewards[0]
    if needed:
        raise ConfigError(
            "eval_dataset is given, and must be left out where nothing says what is right; give reward_funcs or "
            "evaluation.scorer, such as reasoning_gym_answer"
        )
    return None
