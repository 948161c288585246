"""Checks of rewards before and during a run: stop the run where a reward certainly cannot work, else warn once."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alignlab.config.policy_gradient import STEP_ADVANTAGES
from alignlab.config.trainers import GRPOConfig, OnlineConfig, PPOConfig
from alignlab.errors import ConfigError, RewardError
from alignlab.evaluation.learning_signal import SignalMonitor
from alignlab.evaluation.signal_messages import SignalSettings
from alignlab.scoring.calls import FAILURE_KINDS
from alignlab.scoring.columns import check_columns, reward_columns
from alignlab.scoring.loading import LoadedReward
from alignlab.scoring.runner import RewardRunner
from alignlab.scoring.values import clipped
from alignlab.types import Prompt, Rollout

logger = logging.getLogger(__name__)

FIRST_CALLS = 3
"""Failed calls over all ranks, without a successful one, after which a reward counts as broken."""
MIN_COMPLETIONS = 256
"""Completions without any reward after which a run is stopped, once all its prompts have been sampled too."""


def signal_settings(config: OnlineConfig, rewards: RewardRunner) -> SignalSettings:
    """Return the settings by which the learning signal of an online run is judged."""
    by_rewards = config.takes_rewards == "needed"
    return SignalSettings(
        by_rewards=by_rewards,
        by_group=by_rewards and not is_compared_over_step(config),
        group_size=config.group_size,
        max_new_tokens=config.sampling.max_new_tokens,
        mask_truncated=config.mask_truncated,
        temperature=config.sampling.temperature,
        can_resample=isinstance(config, GRPOConfig) and not config.dynamic_sampling,
        reward_names=rewards.names,
    )


def is_compared_over_step(config: OnlineConfig) -> bool:
    """Return whether a completion's reward is compared with the whole step rather than with its group."""
    return isinstance(config, PPOConfig) or (isinstance(config, GRPOConfig) and config.advantage in STEP_ADVANTAGES)


def check_rewards(rewards: RewardRunner, prompts: Sequence[Prompt], config: OnlineConfig) -> None:
    """Refuse rewards that can never work on the training data, and set the runner's columns.

    Raises:
        ConfigError: all weights are 0, or a reward needs a column that the data lacks.
    """
    check_weights(rewards.rewards, needed=config.takes_rewards == "needed")
    check_columns(rewards.rewards, prompts, data="the training data")
    rewards.columns = reward_columns(prompts)


def check_weights(rewards: Sequence[LoadedReward], *, needed: bool) -> None:
    """Refuse rewards whose weights are all 0.

    Args:
        needed: whether the trainer learns from rewards.

    Raises:
        ConfigError: with their names.
    """
    if needed and rewards and not any(reward.weight for reward in rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise ConfigError(
            f"the weight of each reward ({names}) is 0, and at least one must not be: every total would be 0, and "
            "nothing could be learnt; give one a weight"
        )


def failures_of_ranks(
    failures: Counter[tuple[str, str]], names: Sequence[str], gather: Callable[[Tensor], Tensor]
) -> list[list[tuple[str, str, int]]]:
    """Return the failed calls of each rank's rewards, for a checkpoint; every rank calls this together."""
    keys = [(name, kind) for name in names for kind in FAILURE_KINDS]
    counts = gather(torch.tensor([[failures[key] for key in keys]])).tolist()
    return [[(*key, n) for key, n in zip(keys, row, strict=True) if n] for row in counts]


def failures_of_rank(
    failures: Sequence[Sequence[tuple[str, str, int]]], rank: int, num_ranks: int
) -> Counter[tuple[str, str]]:
    """Return one rank's row of the output of `failures_of_ranks`.

    On another number of ranks than before each takes over the rows of some earlier ones, so that none is lost.
    """
    counts: Counter[tuple[str, str]] = Counter()
    for row in failures[rank::num_ranks]:
        counts.update({(name, kind): count for name, kind, count in row})
    return counts


def stop_broken_rewards(rewards: RewardRunner, reduce_sum: Callable[[Tensor], Tensor]) -> None:
    """Raise if a reward has failed at each of its first calls; every rank calls this together.

    Without this, a function that always raises, such as one with a misspelt attribute, would be tolerated
    `max_failures` times, while the policy learns from the other rewards or from none. Timeouts are left to
    `max_failures`: the function may still be starting.

    Raises:
        RewardError: with the reward and its last failure.
    """
    names = rewards.names
    if not names:
        return
    counts = torch.tensor(
        [
            [rewards.num_calls[name], rewards.num_useful_calls[name], rewards.failures[name, "timeout"]]
            for name in names
        ],
        dtype=torch.float64,
    )
    for name, (calls, successes, timeouts) in zip(names, reduce_sum(counts).tolist(), strict=True):
        if successes == 0 and calls >= FIRST_CALLS and not timeouts:
            raise RewardError(
                f"a reward must give values, and {name!r} has failed at each of its {calls:g} calls; correct it, and "
                f"begin again. Last: {rewards.last_failures.get(name, 'see the messages of the other ranks')}"
            )


def stop_without_any_reward(signal: SignalMonitor, config: OnlineConfig, num_prompts: int, steps: int) -> None:
    """Raise if no completion has had a reward, once all prompts of the data have been tried.

    Args:
        num_prompts: size of the training data.
        steps: completed steps.

    Raises:
        RewardError: with the names of the rewards.
    """
    tried = steps * config.num_prompts
    completions = tried * config.group_size
    if signal.never_rewarded and tried >= num_prompts and completions >= MIN_COMPLETIONS:
        names = " and ".join(map(repr, signal.settings.reward_names))
        raise RewardError(
            f"none of {completions} completions got a reward, over all {num_prompts} prompts of the training data: "
            f"{names} gave None for each or failed, so that nothing can be learnt; correct the rewards or the data, "
            "and try them with alignlab check"
        )


def warn_of_unrewarded(rollouts: Sequence[Rollout]) -> bool:
    """Warn of completions without a reward, showing the first; return whether there are any."""
    unrewarded = [
        (rollout.prompt, completion)
        for rollout in rollouts
        for completion, reward in zip(rollout.completions, rollout.rewards, strict=True)
        if math.isnan(reward)
    ]
    if not unrewarded:
        return False
    prompt, completion = unrewarded[0]
    total = sum(len(rollout.completions) for rollout in rollouts)
    logger.warning(
        "%d of %d completions of a step have no reward, since each function gave None or failed, and are left out of "
        "the training; the metric unrewarded_frac counts them, and this message comes once. First: row %d, prompt %s, "
        "completion %s",
        len(unrewarded), total, prompt.index, clipped(prompt.text), clipped(completion.text),
    )  # fmt: skip
    return True
