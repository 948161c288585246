"""Arguments of a trainer that are of another kind than it takes, refused by name before anything is loaded."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from alignlab.config.trainers import TrainerConfig
from alignlab.errors import ConfigError


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
