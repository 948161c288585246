"""Checks of the options of rewards, before anything is scored."""

from __future__ import annotations

import math
from typing import Any


def check_whole(reward: str, name: str, value: Any) -> None:
    """Raise ValueError if an option is no whole number."""
    _check(isinstance(value, int) and not isinstance(value, bool), reward, name, value, "a whole number")


def check_number(reward: str, name: str, value: Any) -> None:
    """Raise ValueError if an option is no finite number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    _check(is_number, reward, name, value, "a number")


def check_switch(reward: str, name: str, value: Any) -> None:
    """Raise ValueError if an option is neither true nor false."""
    _check(isinstance(value, bool), reward, name, value, "true or false")


def check_choice(reward: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError if an option is none of the choices."""
    requirement = f"{', '.join(choices[:-1])} or {choices[-1]}"
    _check(isinstance(value, str) and value in choices, reward, name, value, requirement)


def _check(is_valid: bool, reward: str, name: str, value: Any, requirement: str) -> None:
    if not is_valid:
        raise ValueError(f"the option {name} of {reward} must be {requirement}, and is {value!r:.80}; correct it")
