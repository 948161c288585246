"""Reward that is the weighted sum of several others."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from alignlab_rewards.answers.options import check_number


def combine(*, parts: Mapping[str, float | Mapping[str, Any]], **columns: Any) -> list[float | None]:
    """Return the weighted sum of the parts that apply to a completion; None where none does.

    Args:
        parts: by name, a weight, or a mapping with `weight` (default 1) and the part's options, such as
            `{"math_answer": 1.0, "length": {"weight": 0.2, "max_tokens": 64}}`. A name is an installed plug-in's or
            `package.module:function`. Parts are synchronous.
        columns: prompts, completions and the dataset's columns, which every part gets.
    """
    _check_parts(parts)
    count = len(columns["completions"])
    totals: list[float | None] = [None] * count
    for name, part in parts.items():
        options = dict(part) if isinstance(part, Mapping) else {"weight": part}
        weight = options.pop("weight", 1.0)
        check_number("combine", f"weight of the part {name}", weight)
        reward = _load(name)
        arguments = _arguments(name, reward, columns, options)
        # A shipped part checks its options on an empty batch too, which others may not expect.
        is_shipped = str(getattr(reward, "__module__", "")).startswith(f"{__package__}.")
        values = _values(name, reward(**arguments), count) if count or is_shipped else []
        for i, value in enumerate(values):
            if value is not None:
                totals[i] = (totals[i] or 0.0) + weight * value
    return totals


def _check_parts(parts: Any) -> None:
    if not isinstance(parts, Mapping) or not parts:
        raise ValueError(
            f"the option parts of combine must be a mapping of rewards to their weights, and is {parts!r:.80}; "
            'write it as {"math_answer": 1.0, "length": {"weight": 0.2, "max_tokens": 64}}'
        )
    for name, part in parts.items():
        if not isinstance(part, Mapping | int | float) or isinstance(part, bool):
            raise ValueError(
                f"the part {name} of combine must be a weight, or a mapping of its weight and options, and is "
                f"{part!r:.80}; correct it"
            )


def _arguments(
    name: str, reward: Callable[..., Any], columns: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a part: the columns that it takes, and its options.

    Raises:
        ValueError: the part is asynchronous, has no such option, or requires a column that there is not.
    """
    if inspect.iscoroutinefunction(reward):
        raise ValueError(
            f"{name}, a part of combine, is asynchronous, and parts are not; give it as a reward of its own"
        )
    parameters = inspect.signature(reward).parameters
    unknown = next((option for option in options if option not in parameters), None)
    if unknown is not None:
        raise ValueError(f"{name}, a part of combine, has no option {unknown!r}")
    arguments = {**columns, **options}
    missing = next((column for column in _required(parameters) if column not in arguments), None)
    if missing is not None:
        raise ValueError(
            f"{name}, a part of combine, requires {missing}, and the dataset has no such column; add it, or give "
            "the part an option of that name"
        )
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {column: arguments[column] for column in parameters if column in arguments}


def _required(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in variadic
    ]


def _values(name: str, result: Any, count: int) -> list[float | None]:
    """Return a part's values; NaN of a tensor, an array or a Series, which cannot hold None, becomes None.

    Raises:
        ValueError: the result is no list, or has too many or too few values.
    """
    is_array = hasattr(result, "tolist")
    values = result.tolist() if is_array else result
    if not isinstance(values, list | tuple) or len(values) != count:
        raise ValueError(
            f"{name}, a part of combine, must return a list of {count} values, and returned {result!r:.200}"
        )
    return [None if is_array and _is_missing(value) else value for value in values]


def _is_missing(value: Any) -> bool:
    """Return True for NaN and the NA of pandas."""
    return type(value).__name__ == "NAType" or bool(value != value)


def _load(name: str) -> Callable[..., Any]:
    """Return the plug-in of a name, or the function of `package.module:function`."""
    for entry in entry_points(group="alignlab.rewards", name=str(name)):
        return entry.load()
    if not isinstance(name, str) or ":" not in name:
        installed = ", ".join(sorted(entry.name for entry in entry_points(group="alignlab.rewards")))
        raise ValueError(f"combine has a part {name!r} that is not installed; installed: {installed}")
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"combine has a part {name!r} that cannot be imported: {error}; correct its name") from error
