"""Several rewards as one: the weighted sum of their values."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any


def combine(*, parts: Mapping[str, float | Mapping[str, Any]], **given: Any) -> list[float | None]:
    """The weighted sum of the parts that apply to a sample; None where none does.

    Args:
        parts: by name, a weight, or a mapping with `weight` (default 1) and the part's options, such as
            `{"math_answer": 1.0, "length": {"weight": 0.2, "max_tokens": 64}}`. A name is an installed plug-in's or
            `package.module:function`. Parts are synchronous.
        given: prompts, completions and columns, handed to every part.
    """
    count = len(given["completions"])
    totals: list[float | None] = [None] * count
    for name, part in parts.items():
        options = dict(part) if isinstance(part, Mapping) else {"weight": part}
        weight = float(options.pop("weight", 1.0))
        part_function = _find(name)
        unknown = set(options) - set(inspect.signature(part_function).parameters)
        if unknown:
            raise ValueError(f"{name}, a part of combine, has no option {sorted(unknown)[0]!r}")
        values = part_function(**{**given, **options})
        if not isinstance(values, list) or len(values) != count:
            raise ValueError(
                f"{name}, a part of combine, must return a list of {count} values, and returned {values!r:.200}"
            )
        for i, value in enumerate(values):
            if value is not None:
                totals[i] = (totals[i] or 0.0) + weight * value
    return totals


def _find(name: str) -> Callable[..., Any]:
    for entry in entry_points(group="alignlab.rewards", name=name):
        return entry.load()
    if ":" not in name:
        known = ", ".join(sorted(entry.name for entry in entry_points(group="alignlab.rewards")))
        raise ValueError(f"combine has a part {name!r} that is not installed; installed: {known}")
    return pkgutil.resolve_name(name)
