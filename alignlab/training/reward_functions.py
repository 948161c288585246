"""Reward functions found by name: an installed plug-in, a dotted path, a file, a reward model's folder, or a live
callable."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from alignlab.config.rewards import RewardSettings
from alignlab.errors import ConfigError
from alignlab.training.reward_calls import own_copy
from alignlab.training.reward_lookup import check_options, find_function, made_function, short_name
from alignlab.training.reward_process import IsolatedReward

REWARD_MODEL = "reward_model"


@dataclass(frozen=True)
class LoadedReward:
    """A reward function, ready to be called.

    Attributes:
        name: what it is called in metrics and reports.
        function: with TRL's signature, sync or async; see `alignlab.types.RewardFunction`. What is found by name may
            also be a class: it is made with the options, and its object is the function.
        weight: of its values in the total.
        options: keyword arguments, passed on every call; they take the place of a column of the same name.
        given: the settings by which it was found; None for a callable.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    given: RewardSettings | None = None

    @property
    def settings(self) -> RewardSettings:
        """The settings of a run from a file that asks for it."""
        given = self.given or RewardSettings(name=self.name, options=dict(self.options))
        return given.model_copy(update={"weight": self.weight})


def load_reward(reward: RewardSettings | Callable[..., Any]) -> LoadedReward:
    """Find a reward function and check its options against its signature.

    A name is looked up, in this order, as `file.py:function` (relative to the working directory), as an installed
    plug-in (entry points of the group "alignlab.rewards"), as the local folder of a reward model, which is the plug-in
    `reward_model` with that folder for its option `model`, and as `package.module.function`.

    With `run_in: process`, nothing of it is imported here; see `reward_process`.

    Raises:
        ConfigError: there is no such function, it cannot be imported, or an option is unknown to it.
    """
    if not isinstance(reward, RewardSettings):
        _check_callable(reward)
        return LoadedReward(_callable_name(reward), reward)
    given, reward = reward, _of_model(reward)
    if reward.run_in == "process":
        return _load_isolated(reward, given)
    function = find_function(reward.name)
    if not callable(function):
        raise ConfigError(f"reward {reward.name!r} must be a function, and is {type(function).__name__}")
    check_options(reward.name, function, reward.options)
    options = own_copy(dict(reward.options))
    if inspect.isclass(function):
        made = made_function(reward.name, function, options)
        return LoadedReward(short_name(reward.name), made, reward.weight, given=given)
    return LoadedReward(short_name(reward.name), function, reward.weight, options, given)


def _load_isolated(reward: RewardSettings, given: RewardSettings) -> LoadedReward:
    """Start the process of a reward that runs in one, which finds the function and checks its options."""
    if reward.name == REWARD_MODEL:
        raise ConfigError(
            f"the reward {reward.options.get('model', reward.name)!r} is a reward model, which shares the policy's "
            "memory and runs in the training's process; remove run_in: process"
        )
    function = IsolatedReward(reward)
    return LoadedReward(short_name(reward.name), function, reward.weight, function.call_options, given)


def load_weighted(reward: Any, weight: Any) -> LoadedReward:
    """Find the reward of a pair (reward, weight), the reward being a name or a callable.

    Raises:
        ConfigError: the weight is no finite number, the settings have one of their own, or as `load_reward`.
    """
    is_number = isinstance(weight, numbers.Real) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight):
        raise ConfigError(
            f"the weight of a reward must be a finite number, and is {weight!r}; write it as (reward, weight), such as "
            "(my_reward, 0.5)"
        )
    if isinstance(reward, RewardSettings):
        raise ConfigError(
            f"the reward {reward.name!r} has two weights, {reward.weight:g} in its RewardSettings and {weight:g} "
            "beside them; give it in RewardSettings(weight=...) alone"
        )
    loaded = load_reward(RewardSettings(name=reward) if isinstance(reward, str) else reward)
    return replace(loaded, weight=float(weight))


def _check_callable(reward: Any) -> None:
    """Refuse what is no reward function.

    Raises:
        ConfigError: it cannot be called, or is a model, which is called with token ids and knows no tokenizer.
    """
    if isinstance(reward, PreTrainedModel | PeftModel):
        raise ConfigError(
            f"a reward model is given by its folder, and reward_funcs holds a live {type(reward).__name__}, which has "
            "no tokenizer; save both with save_pretrained(folder), and give the folder's name, or RewardSettings("
            'name="reward_model", options={"model": folder})'
        )
    if not callable(reward):
        raise ConfigError(
            f"a reward must be a callable or RewardSettings, and is {reward!r}; pass one of these, or a pair "
            "(callable, weight)"
        )


def _of_model(reward: RewardSettings) -> RewardSettings:
    """The settings of the plug-in for reward models, where the name is the folder of one."""
    if not Path(reward.name).is_dir():
        return reward
    from alignlab.models.reward_checkpoints import is_reward_model

    if not is_reward_model(reward.name):
        return reward
    return reward.model_copy(update={"name": REWARD_MODEL, "options": {**reward.options, "model": reward.name}})


def _callable_name(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return _callable_name(function.func)
    return str(getattr(function, "__name__", type(function).__name__))
