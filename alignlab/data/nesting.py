"""How deeply a row's values may be nested: all that reads them goes down by calling itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_DEPTH = 100


def is_too_deep(value: Any) -> bool:
    """Return whether lists and mappings in a value are nested deeper than `MAX_DEPTH`, or hold themselves."""
    level = [value]
    for _ in range(MAX_DEPTH):
        containers = [held for held in level if isinstance(held, Mapping | list | tuple)]
        if not containers:
            return False
        # Each container once: what is repeated at a level need not be looked through again.
        unique = {id(held): held for held in containers}.values()
        level = [part for held in unique for part in (held.values() if isinstance(held, Mapping) else held)]
    return any(isinstance(held, Mapping | list | tuple) for held in level)


def parse_json(text: str) -> Any:
    """Return what a JSON text in a row holds.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if is_too_deep(value):
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    return value
