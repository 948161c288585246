"""Limit of the nesting of a row's values, because all code that reads them is recursive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 100


def is_too_deep(value: Any) -> bool:
    """Return True if lists and mappings in a value are nested deeper than `MAX_DEPTH`, or contain themselves."""
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [held for held in level if isinstance(held, Mapping | list | tuple)]
        if not containers:
            return False
        # Each container once: a shared one may occur exponentially often.
        unique = {id(held): held for held in containers}.values()
        level = [item for held in unique for item in (held.values() if isinstance(held, Mapping) else held)]
    return any(isinstance(held, Mapping | list | tuple) for held in level)


def parse_json(text: str) -> Any:
    """Return the value of a JSON text in a row.

    Raises:
        ValueError: the text is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if is_too_deep(value):
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    return value
