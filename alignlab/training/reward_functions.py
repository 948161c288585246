"""Reward functions found by name: an installed plug-in, a dotted path, a file, a reward model's folder, or a live
callable."""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import inspect
import math
import numbers
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from alignlab.config.rewards import RewardSettings
from alignlab.errors import ConfigError

ENTRY_POINT_GROUP = "alignlab.rewards"
REWARD_MODEL = "reward_model"
_GIVEN = ("prompts", "completions", "prompt_ids", "completion_ids")


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

    Raises:
        ConfigError: there is no such function, it cannot be imported, or an option is unknown to it.
    """
    if not isinstance(reward, RewardSettings):
        _check_callable(reward)
        _check_call(_callable_name(reward), reward)
        return LoadedReward(_callable_name(reward), reward)
    given, reward = reward, _of_model(reward)
    function = _find(reward.name)
    if not callable(function):
        raise ConfigError(f"reward {reward.name!r} must be a function, and is {type(function).__name__}")
    _check_options(reward.name, function, reward.options)
    if inspect.isclass(function):
        made = _made(reward, function)
        _check_call(reward.name, made)
        return LoadedReward(_short_name(reward.name), made, reward.weight, given=given)
    _check_call(reward.name, function)
    return LoadedReward(_short_name(reward.name), function, reward.weight, dict(reward.options), given)


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


def installed_rewards() -> dict[str, EntryPoint]:
    """The plug-ins that are installed, by name."""
    return {entry.name: entry for entry in sorted(entry_points(group=ENTRY_POINT_GROUP))}


def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Named parameters of a function; None where Python cannot know them, as of some built-in functions."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def required(known: Mapping[str, inspect.Parameter]) -> list[str]:
    """Names of the parameters that a call must give."""
    return [
        name
        for name, parameter in known.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]


def accepts_any(known: Mapping[str, inspect.Parameter]) -> bool:
    """Whether there is a `**columns` among the parameters."""
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())


def _find(name: str) -> Any:
    path, separator, attribute = name.rpartition(":")
    if separator and path.endswith(".py"):
        return _from_file(path, attribute)
    installed = installed_rewards()
    if name in installed:
        return _imported(name, installed[name].load)
    if Path(name).is_dir() or "/" in name:
        raise ConfigError(
            f"the reward model {name!r} must be a local folder of a reward model, and is none; train one with "
            "trainer.type reward, or download a sequence-classification model of one label (hf download) and give its "
            "folder"
        )
    if "." in name or separator:
        return _imported(name, lambda: pkgutil.resolve_name(name))
    near = difflib.get_close_matches(name, installed, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
    raise ConfigError(
        f"a reward must be an installed plug-in, package.module.function or file.py:function, and {name!r} is none; "
        f"{hint}Installed: {', '.join(installed) or 'none'}"
    )


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


def _check_call(name: str, function: Callable[..., Any]) -> None:
    """Refuse a function that no call of a reward fits: all its arguments are given by name.

    Raises:
        ConfigError: it takes none, or one by position alone.
    """
    known = parameters(function)
    if known is None:
        return
    by_place = [each for each in known.values() if each.kind is inspect.Parameter.POSITIONAL_ONLY]
    unmet = [each.name for each in by_place if each.default is each.empty]
    named = [each for each in known.values() if each.kind is not inspect.Parameter.VAR_POSITIONAL]
    signature = "def reward(prompts, completions, **columns)"
    if unmet:
        raise ConfigError(
            f"reward {name!r} takes {unmet[0]} by position alone, and rewards are called with names; write it as "
            f"{signature}"
        )
    if len(named) == len(by_place):
        raise ConfigError(
            f"reward {name!r} takes no argument by name, so that it would see no completion; write it as {signature}"
        )


def _of_model(reward: RewardSettings) -> RewardSettings:
    """The settings of the plug-in for reward models, where the name is the folder of one."""
    if not Path(reward.name).is_dir():
        return reward
    from alignlab.models.reward_checkpoints import is_reward_model

    if not is_reward_model(reward.name):
        return reward
    return reward.model_copy(update={"name": REWARD_MODEL, "options": {**reward.options, "model": reward.name}})


def _imported(name: str, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (Exception, SystemExit) as error:  # a module may raise anything, and even end the process
        raise ConfigError(
            f"reward {name!r} must be importable, and is not: {type(error).__name__}: {error}; "
            "correct the name, install its package, or give file.py:function"
        ) from error


def _from_file(path: str, attribute: str) -> Any:
    """A function of a Python file, which is run once a process."""
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"the file of a reward must exist, and {path} does not (working directory: {Path.cwd()})")
    module_name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            raise ConfigError(
                f"the file of a reward must run, and {path} raised {error!r}; correct the file"
            ) from error
    found = vars(sys.modules[module_name])
    if attribute not in found:
        functions = [name for name, value in found.items() if inspect.isfunction(value)]
        raise ConfigError(f"{path} must hold the reward {attribute!r}, and does not; it has: {', '.join(functions)}")
    return found[attribute]


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """An option must be a parameter that the function names: `**columns` takes the dataset's columns alone."""
    known = parameters(function)
    if known is None:
        return
    named = [
        key
        for key, parameter in known.items()
        if key not in _GIVEN
        and parameter.kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    for option in options:
        if option not in named:
            near = difflib.get_close_matches(option, named, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"reward {name!r} has no option {option!r}; {hint}"
                f"Its options, and the columns it reads: {', '.join(named) or 'none'}"
            )


def _made(reward: RewardSettings, kind: Callable[..., Any]) -> Callable[..., Any]:
    """The object of a reward that is a class."""
    missing = [
        name
        for name, parameter in (parameters(kind) or {}).items()
        if parameter.default is parameter.empty and name not in reward.options
    ]
    if missing:
        raise ConfigError(f"reward {reward.name!r} needs the option {missing[0]!r}; add it to its options")
    try:
        made: Callable[..., Any] = kind(**reward.options)
    except ConfigError:
        raise
    except Exception as error:  # of the class's own code
        raise ConfigError(
            f"reward {reward.name!r} is a class, and could not be made with its options {reward.options}: "
            f"{type(error).__name__}: {error}; correct them"
        ) from error
    if not callable(made):
        raise ConfigError(
            f"reward {reward.name!r} is a class whose objects cannot be called; give it a method __call__(self, "
            "prompts, completions, **columns)"
        )
    return made


def _short_name(name: str) -> str:
    return name.rpartition(":")[2].rpartition(".")[2]


def _callable_name(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        return _callable_name(function.func)
    return str(getattr(function, "__name__", type(function).__name__))
