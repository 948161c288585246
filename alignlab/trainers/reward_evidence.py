"""Rewards that cannot work, found out while a run goes on: stopped where that is certain, said once elsewhere."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from alignlab.config.online_rules import STEP_ADVANTAGES
from alignlab.config.trainers import GRPOConfig, OnlineConfig, PPOConfig
from alignlab.errors import ConfigError, RewardError
from alignlab.training.learning_signal import SignalMonitor
from alignlab.training.reward_calls import FAILURE_KINDS
from alignlab.training.reward_columns import check_columns, reward_columns
from alignlab.training.reward_functions import LoadedReward
from alignlab.training.reward_runner import RewardRunner
from alignlab.training.reward_values import clipped
from alignlab.training.signal_sentences import SignalSettings
from alignlab.types import Prompt, Rollout

logger = logging.getLogger(__name__)

FIRST_CALLS = 3
"""Failed calls, over all ranks and without one that worked, after which a reward is taken for broken."""
MIN_COMPLETIONS = 256
"""Completions without any reward before a run is stopped for it, beside a pass over all its prompts."""


def signal_settings(config: OnlineConfig, rewards: RewardRunner) -> SignalSettings:
    """Return what a run from rollouts is to be judged by."""
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
    """Return whether a completion's reward is compared with all others of the step, and not with its group's."""
    return isinstance(config, PPOConfig) or (isinstance(config, GRPOConfig) and config.advantage in STEP_ADVANTAGES)


def check_rewards(rewards: RewardRunner, prompts: Sequence[Prompt], config: OnlineConfig) -> None:
    """Refuse rewards that can never work on the training data, and tell the runner which columns there are.

    Raises:
        ConfigError: each weighs nothing, or one needs what the data do not have.
    """
    check_weights(rewards.rewards, needed=config.takes_rewards == "needed")
    check_columns(rewards.rewards, prompts, data="the training data")
    rewards.columns = reward_columns(prompts)


def check_weights(rewards: Sequence[LoadedReward], *, needed: bool) -> None:
    """Refuse rewards that all weigh nothing.

    Args:
        needed: whether rewards are what is learnt from.

    Raises:
        ConfigError: they do.
    """
    if needed and rewards and not any(reward.weight for reward in rewards):
        names = ", ".join(reward.name for reward in rewards)
        raise ConfigError(
            f"the weight of each reward ({names}) is 0, and at least one must weigh something: every total would be 0, "
            "and nothing could be learnt; give one a weight"
        )


def failures_of_ranks(
    failures: Counter[tuple[str, str]], names: Sequence[str], gather: Callable[[Tensor], Tensor]
) -> list[list[tuple[str, str, int]]]:
    """Failed calls of each rank's rewards, for a checkpoint; every rank calls this together."""
    keys = [(name, kind) for name in names for kind in FAILURE_KINDS]
    counts = gather(torch.tensor([[failures[key] for key in keys]])).tolist()
    return [[(*key, n) for key, n in zip(keys, row, strict=True) if n] for row in counts]


def failures_of_rank(failures: Sequence[Sequence[tuple[str, str, int]]], rank: int) -> Counter[tuple[str, str]]:
    """Return one rank's part of what `failures_of_ranks` gave."""
    return Counter({(name, kind): count for name, kind, count in failures[rank]})


def stop_broken_rewards(rewards: RewardRunner, reduce_sum: Callable[[Tensor], Tensor]) -> None:
    """End the run where a reward has failed at each of its first calls; every rank calls this together.

    A function that raises each time, as for a misspelt attribute, would be survived `max_failures` times, while the
    policy learns from the other rewards or from none. One that is over its time may only be starting, and is left to
    `max_failures`.

    Raises:
        RewardError: naming the reward and its failures.
    """
    names = rewards.names
    if not names:
        return
    counts = torch.tensor(
        [[rewards.num_calls[name], rewards.num_worked[name], rewards.failures[name, "timeout"]] for name in names],
        dtype=torch.float64,
    )
    for name, (calls, worked, late) in zip(names, reduce_sum(counts).tolist(), strict=True):
        if worked == 0 and calls >= FIRST_CALLS and not late:
            raise RewardError(
                f"a reward must give values, and {name!r} has failed at each of its {calls:g} calls; correct it, and "
                f"begin again. Last: {rewards.last_failures.get(name, 'see the messages of the other ranks')}"
            )


def stop_without_any_reward(signal: SignalMonitor, config: OnlineConfig, num_prompts: int, steps: int) -> None:
    """End a run in which no completion has had a reward, once all prompts of the data have been tried.

    Args:
        num_prompts: of the training data.
        steps: that are done.

    Raises:
        RewardError: naming the rewards.
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


def say_unrewarded(rollouts: Sequence[Rollout]) -> bool:
    """Say that some completions have no reward, with the first of them; return whether there are any."""
    groups = [(rollout, i) for rollout in rollouts for i, reward in enumerate(rollout.rewards) if math.isnan(reward)]
    if not groups:
        return False
    rollout, i = groups[0]
    total = sum(len(each.completions) for each in rollouts)
    logger.warning(
        "%d of %d completions of a step have no reward, for each function gave None or failed, and are left out of the "
        "training; unrewarded_frac in the metrics counts them, and this is said once. First: row %d, prompt %s, "
        "completion %s",
        len(groups), total, rollout.prompt.index, clipped(rollout.prompt.text), clipped(rollout.completions[i].text),
    )  # fmt: skip
    return True
