"""Settings of trainers in tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes`; where both have a section as a dict, the fields of the two together."""
    result = dict(base)
    for name, value in changes.items():
        held = result.get(name)
        both = isinstance(held, dict) and isinstance(value, dict)
        result[name] = merged(held, value) if both else value
    return result
