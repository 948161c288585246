"""Rewards loaded from settings (a plug-in, a dotted path, a file, a reward model's folder) or from a callable."""

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
from alignlab.scoring.calls import private_copy
from alignlab.scoring.isolated.reward import IsolatedReward
from alignlab.scoring.plugins import check_call, check_options, find_function, instantiate, short_name

REWARD_MODEL = "reward_model"


@dataclass(frozen=True)
class LoadedReward:
    """A reward function, ready to be called.

    Attributes:
        name: name in metrics and reports.
        function: TRL's signature, sync or async; see `alignlab.types.RewardFunction`. Of a class, which can only be
            looked up by name, this is an instance made with the options.
        weight: factor of the values in the weighted sum.
        options: keyword arguments of every call; an option replaces the column of the same name.
        loaded_from: the settings that the reward was loaded from; None for a callable.
    """

    name: str
    function: Callable[..., Any]
    weight: float = 1.0
    options: Mapping[str, Any] = field(default_factory=dict)
    loaded_from: RewardSettings | None = None

    @property
    def settings(self) -> RewardSettings:
        """The settings that a config file would name this reward with."""
        settings = self.loaded_from or RewardSettings(name=self.name, options=dict(self.options))
        return settings.model_copy(update={"weight": self.weight})


def load_reward(reward: RewardSettings | Callable[..., Any]) -> LoadedReward:
    """Load a reward function and check its options against its signature.

    A name is looked up, in this order, as the local folder of a reward model, which stands for the plug-in
    `reward_model` with its option `model`, as `file.py:function` (relative to the working directory), as an installed
    plug-in (entry points of the group "alignlab.rewards"), and as `package.module.function`.

    With `run_in: process`, the function is imported only in its process; see `scoring.isolated`.

    Raises:
        ConfigError: there is no such function, its import fails, or an option is unknown to it.
    """
    if not isinstance(reward, RewardSettings):
        _check_callable(reward)
        check_call(_callable_name(reward), reward)
        return LoadedReward(_callable_name(reward), reward)
    settings, reward = reward, _as_plugin(reward)
    if reward.run_in == "process":
        return _load_isolated(reward, settings)
    function = find_function(reward.name)
    if not callable(function):
        raise ConfigError(f"reward {reward.name!r} must be a function, and is {type(function).__name__}")
    check_options(reward.name, function, reward.options)
    options = private_copy(dict(reward.options))
    if inspect.isclass(function):
        instance = instantiate(reward.name, function, options)
        check_call(reward.name, instance)
        return LoadedReward(short_name(reward.name), instance, reward.weight, loaded_from=settings)
    check_call(reward.name, function)
    return LoadedReward(short_name(reward.name), function, reward.weight, options, settings)


def _load_isolated(reward: RewardSettings, settings: RewardSettings) -> LoadedReward:
    """Start the process of an isolated reward; the process imports the function and checks its options."""
    if reward.name == REWARD_MODEL:
        raise ConfigError(
            f"the reward {reward.options.get('model', reward.name)!r} is a reward model, which shares the policy's "
            "memory and runs in the training's process; remove run_in: process"
        )
    function = IsolatedReward(reward)
    return LoadedReward(short_name(reward.name), function, reward.weight, function.call_options, settings)


def load_weighted(reward: Any, weight: Any) -> LoadedReward:
    """Load the reward of a pair (reward, weight); the reward is a name or a callable.

    Raises:
        ConfigError: the weight is no finite number, the reward is a RewardSettings, which has a weight already, or see
            `load_reward`.
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
    """Raise if an object is no reward function.

    Raises:
        ConfigError: the object cannot be called, or is a live model, which takes token ids and has no tokenizer.
    """
    if isinstance(reward, PreTrainedModel | PeftModel):
        raise ConfigError(
            f"a reward model is given by its folder, and reward_funcs holds a live {type(reward).__name__}, which has "
            "no tokenizer; save both with save_pretrained(folder), and give the folder's name, or RewardSettings("
            'name="reward_model", options={"model": folder})'
        )
    if inspect.isclass(reward):
        raise ConfigError(
            f"reward_funcs holds the class {reward.__name__}, and a reward is a function or an object that can be "
            f"called; give an object, {reward.__name__}(...)"
        )
    if not callable(reward):
        raise ConfigError(
            f"a reward must be a callable or RewardSettings, and is {reward!r}; pass one of these, or a pair "
            "(callable, weight)"
        )


def _as_plugin(reward: RewardSettings) -> RewardSettings:
    """Return the settings of the plug-in `reward_model` where the name is a reward model's folder; else the same."""
    if not Path(reward.name).is_dir():
        return reward
    from alignlab.models.hub.reward_checkpoints import is_reward_model

    if not is_reward_model(reward.name):
        return reward
    return reward.model_copy(update={"name": REWARD_MODEL, "options": {**reward.options, "model": reward.name}})


def _callable_name(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return _callable_name(function.func)
    return str(getattr(function, "__name__", type(function).__name__))
