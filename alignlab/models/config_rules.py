"""Rules that the checks of a `PolicyConfig` share."""

from __future__ import annotations

from typing import Any

from alignlab.errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Raise a ConfigError unless a rule holds; the message names the rule, the value and what to change."""
    if not holds:
        raise ConfigError(message)


def require_size(name: str, value: Any, fix: int) -> None:
    """Raise a ConfigError unless a size is a whole number of at least 1; `fix` is one that would do."""
    is_size = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    require(is_size, f"{name} is {value!r}, and must be a whole number of at least 1; use {fix}")
