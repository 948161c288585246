"""Checks of a trainer's arguments by name and kind, before anything is loaded."""

from __future__ import annotations

import difflib
import inspect
import sys
from abc import ABCMeta
from collections.abc import Callable, Collection, Sequence
from typing import Any

from alignlab.config.trainers import TrainerConfig
from alignlab.config.trl_names import PEER_ARGUMENTS
from alignlab.errors import ConfigError


class NamedArguments(ABCMeta):
    """Metaclass of trainers, which names the right arguments where a trainer is made with wrong ones."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a trainer.

        Raises:
            ConfigError: an argument is unknown or missing, or given twice.
        """
        accepted = _argument_names(cls)
        for name in kwargs:
            if name not in accepted:
                raise ConfigError(_unknown_argument(cls.__name__, name, accepted))
        signature = _signature(cls)
        named = {name: value for name, value in kwargs.items() if name in signature.parameters}
        try:
            signature.bind(None, *args, **named)
        except TypeError as error:
            raise ConfigError(
                f"{cls.__name__}: {error}; its arguments are {', '.join(accepted)}, and of these "
                f"{', '.join(_required(cls))} must be given"
            ) from None
        return super().__call__(*args, **kwargs)


def _signature(trainer: type) -> inspect.Signature:
    """Return the signature of a trainer, or of the base class to which it passes its positional arguments."""
    for owner in trainer.__mro__:
        if "__init__" not in vars(owner):
            continue
        signature = inspect.signature(vars(owner)["__init__"])
        if all(p.kind is not inspect.Parameter.VAR_POSITIONAL for p in signature.parameters.values()):
            return signature
    raise AssertionError("object's own __init__ takes no arguments")


def _argument_names(trainer: type) -> list[str]:
    """Return the names of a trainer's arguments, with those that it passes on to its base class."""
    names: dict[str, None] = {}
    for owner in trainer.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        names |= dict.fromkeys(parameter.name for parameter in parameters if parameter.kind not in variadic)
        if all(parameter.kind is not inspect.Parameter.VAR_KEYWORD for parameter in parameters):
            break
    return list(names)


def _required(trainer: type) -> list[str]:
    parameters = list(_signature(trainer).parameters.values())[1:]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [p.name for p in parameters if p.default is p.empty and p.kind is positional]


def _unknown_argument(trainer: str, name: str, accepted: Collection[str]) -> str:
    problem = f"{trainer} has no argument {name!r}"
    if name in PEER_ARGUMENTS:
        return f"{problem}; what TRL calls {name} is here {PEER_ARGUMENTS[name]}"
    close = difflib.get_close_matches(name, accepted, n=1)
    if close:
        return f"{problem}; did you mean {close[0]!r}?"
    return f"{problem}; it has {', '.join(accepted)}, and settings such as num_steps are in config"


def check_config(trainer: type, config: Any) -> None:
    """Raise if the config is not of the trainer's config class.

    Args:
        trainer: a class; the annotation of `config` in it or its base names the config class.

    Raises:
        ConfigError: with that class.
    """
    expected = _config_class(trainer)
    if not isinstance(config, expected):
        raise ConfigError(
            f"config must be {expected.__name__} for {trainer.__name__}, and is {type(config).__name__}; use "
            f"{expected.__name__}(num_steps=...)"
        )


def _config_class(trainer: type) -> type:
    for owner in trainer.__mro__:
        annotation = inspect.get_annotations(owner).get("config")
        if annotation is not None:
            names = vars(sys.modules[owner.__module__])
            config_class: type = annotation if isinstance(annotation, type) else names[annotation]
            return config_class
    return TrainerConfig


def check_callbacks(callbacks: Any) -> None:
    """Raise if a callback cannot be called as `callback(trainer, step, metrics)`.

    Raises:
        ConfigError: with its place among the callbacks.
    """
    if not isinstance(callbacks, Sequence):
        raise ConfigError(f"callbacks must be a list, and is {type(callbacks).__name__}; give [callback]")
    for number, callback in enumerate(callbacks):
        if not callable(callback) or not _takes_three(callback):
            raise ConfigError(
                f"callbacks[{number}] is {callback!r:.80}, and must be a function of (trainer, step, metrics); give it "
                "these three parameters"
            )


def _takes_three(callback: Callable[..., Any]) -> bool:
    try:
        signature = inspect.signature(callback)
    except (TypeError, ValueError):  # a builtin without a signature
        return True
    try:
        signature.bind(None, 0, {})
    except TypeError:
        return False
    return True
