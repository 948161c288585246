"""Arguments of a trainer that it does not take, or of another kind, refused by name before anything is loaded."""

from __future__ import annotations

import difflib
import inspect
import sys
from abc import ABCMeta
from collections.abc import Callable, Collection, Sequence
from typing import Any

from alignlab.config.peer_names import PEER_ARGUMENTS
from alignlab.config.trainers import TrainerConfig
from alignlab.errors import ConfigError


class NamedArguments(ABCMeta):
    """The class of trainers: one that is made with arguments that it does not take is refused with the right ones."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Make a trainer.

        Raises:
            ConfigError: an argument is unknown or missing, or given twice.
        """
        known = _argument_names(cls)
        for name in kwargs:
            if name not in known:
                raise ConfigError(_unknown_argument(cls.__name__, name, known))
        signature = _signature(cls)
        try:
            signature.bind(None, *args, **{name: held for name, held in kwargs.items() if name in signature.parameters})
        except TypeError as error:
            raise ConfigError(
                f"{cls.__name__}: {error}; its arguments are {', '.join(known)}, and of these "
                f"{', '.join(_required(cls))} must be given"
            ) from None
        return super().__call__(*args, **kwargs)


def _signature(trainer: type) -> inspect.Signature:
    """Return the signature that names the arguments by position: of a trainer, or of the base that it hands them to."""
    for owner in trainer.__mro__:
        if "__init__" not in vars(owner):
            continue
        signature = inspect.signature(vars(owner)["__init__"])
        if all(each.kind is not inspect.Parameter.VAR_POSITIONAL for each in signature.parameters.values()):
            return signature
    raise AssertionError("object's own __init__ takes no arguments")


def _argument_names(trainer: type) -> list[str]:
    """Return the arguments of a trainer, with those that it hands on to its base."""
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
    return [each.name for each in parameters if each.default is each.empty and each.kind is positional]


def _unknown_argument(trainer: str, name: str, known: Collection[str]) -> str:
    what = f"{trainer} has no argument {name!r}"
    if name in PEER_ARGUMENTS:
        return f"{what}; what TRL calls {name} is here {PEER_ARGUMENTS[name]}"
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f"{what}; did you mean {close[0]!r}?"
    return f"{what}; it has {', '.join(known)}, and settings such as num_steps are in config"


def check_config(trainer: type, config: Any) -> None:
    """Raise if a trainer is given another config than its own.

    Args:
        trainer: a class that says which by its annotation of `config`, or by its base's.

    Raises:
        ConfigError: with the class that it takes.
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
            found: type = annotation if isinstance(annotation, type) else names[annotation]
            return found
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
    except (TypeError, ValueError):  # a builtin, which does not say
        return True
    try:
        signature.bind(None, 0, {})
    except TypeError:
        return False
    return True
