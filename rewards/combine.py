"""Several rewards as one: the weighted sum of their values."""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable, Mapping
from importlib.metadata import entry_points
from typing import Any

from alignlab_rewards.answers.options import check_number


def combine(*, parts: Mapping[str, float | Mapping[str, Any]], **given: Any) -> list[float | None]:
    """The weighted sum of the parts that apply to a sample; None where none does.

    Args:
        parts: by name, a weight, or a mapping with `weight` (default 1) and the part's options, such as
            `{"math_answer": 1.0, "length": {"weight": 0.2, "max_tokens": 64}}`. A name is an installed plug-in's or
            `package.module:function`. Parts are synchronous.
        given: prompts, completions and columns, handed to every part.
    """
    _check_parts(parts)
    count = len(given["completions"])
    totals: list[float | None] = [None] * count
    for name, part in parts.items():
        options = dict(part) if isinstance(part, Mapping) else {"weight": part}
        weight = options.pop("weight", 1.0)
        check_number("combine", f"weight of the part {name}", weight)
        part_function = _find(name)
        arguments = _arguments(name, part_function, given, options)
        # A part of ours checks its options on an empty batch too, which others may not expect.
        is_ours = str(getattr(part_function, "__module__", "")).startswith(f"{__package__}.")
        values = _values(name, part_function(**arguments), count) if count or is_ours else []
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
    name: str, function: Callable[..., Any], given: Mapping[str, Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a part is called with: what it takes of the call's arguments, and its options.

    Raises:
        ValueError: it has no such option, or requires what is neither given nor an option.
    """
    if inspect.iscoroutinefunction(function):
        raise ValueError(
            f"{name}, a part of combine, is asynchronous, and parts are not; give it as a reward of its own"
        )
    known = inspect.signature(function).parameters
    for option in options:
        if option not in known:
            raise ValueError(f"{name}, a part of combine, has no option {option!r}")
    arguments = {**given, **options}
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    for column, parameter in known.items():
        if parameter.default is parameter.empty and parameter.kind not in variadic and column not in arguments:
            raise ValueError(
                f"{name}, a part of combine, requires {column}, and the dataset has no such column; add it, or give "
                "the part an option of that name"
            )
    takes_all = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values())
    return arguments if takes_all else {column: arguments[column] for column in known if column in arguments}


def _values(name: str, result: Any, count: int) -> list[float | None]:
    """A part's values; NaN in a tensor, an array or a Series, which hold no None, is None.

    Raises:
        ValueError: they are no list, or too many or too few.
    """
    is_array = hasattr(result, "tolist")
    values = result.tolist() if is_array else result
    if not isinstance(values, list | tuple) or len(values) != count:
        raise ValueError(
            f"{name}, a part of combine, must return a list of {count} values, and returned {result!r:.200}"
        )
    return [None if is_array and _is_missing(value) else value for value in values]


def _is_missing(value: Any) -> bool:
    """Return whether a value of an array stands for no value: NaN, or the NA of pandas."""
    return type(value).__name__ == "NAType" or bool(value != value)


def _find(name: str) -> Callable[..., Any]:
    for entry in entry_points(group="alignlab.rewards", name=str(name)):
        return entry.load()
    if not isinstance(name, str) or ":" not in name:
        known = ", ".join(sorted(entry.name for entry in entry_points(group="alignlab.rewards")))
        raise ValueError(f"combine has a part {name!r} that is not installed; installed: {known}")
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"combine has a part {name!r} that cannot be imported: {error}; correct its name") from error
