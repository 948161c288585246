"""Options of the rewards here, checked before anything is scored."""

from __future__ import annotations

import math
from typing import Any


def check_whole(reward: str, name: str, value: Any) -> None:
    """Raise if an option is no whole number.

    Raises:
        ValueError: with the option and its value.
    """
    _check(isinstance(value, int) and not isinstance(value, bool), reward, name, value, "a whole number")


def check_number(reward: str, name: str, value: Any) -> None:
    """Raise if an option is no finite number.

    Raises:
        ValueError: with the option and its value.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    _check(is_number, reward, name, value, "a number")


def check_switch(reward: str, name: str, value: Any) -> None:
    """Raise if an option is neither true nor false.

    Raises:
        ValueError: with the option and its value.
    """
    _check(isinstance(value, bool), reward, name, value, "true or false")


def check_choice(reward: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise if an option is none of the choices.

    Raises:
        ValueError: with the option and its value.
    """
    must = f"{', '.join(choices[:-1])} or {choices[-1]}"
    _check(isinstance(value, str) and value in choices, reward, name, value, must)


def _check(is_right: bool, reward: str, name: str, value: Any, must: str) -> None:
    if not is_right:
        raise ValueError(f"the option {name} of {reward} must be {must}, and is {value!r:.80}; correct it")
