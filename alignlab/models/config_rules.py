"""The rule that every check of a `PolicyConfig` states."""

from __future__ import annotations

from alignlab.errors import ConfigError


def require(holds: bool, message: str) -> None:
    """Raise a ConfigError unless a rule holds; the message names the rule, the value and what to change."""
    if not holds:
        raise ConfigError(message)
