"""What tells one reward function from another when a run goes on: its source, and the values that are bound to it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from alignlab.digests import digest_of_values


def source_digest(function: Callable[..., Any]) -> str | None:
    """Digest of a function: of the source of its file (of its own source in the main program) and of the plain values
    that are bound to it, as by `functools.partial`; None where Python does not know the source. A function that runs in
    a process of its own knows it itself: nothing of it is imported here."""
    if hasattr(function, "isolated_source"):
        isolated: str | None = function.isolated_source
        return isolated
    bound: list[Any] = []
    while isinstance(function, functools.partial):
        bound.append([*map(_plain, function.args), {name: _plain(value) for name, value in function.keywords.items()}])
        function = function.func
    is_object = not (inspect.isroutine(function) or inspect.isclass(function))
    subject = type(function) if is_object else function
    try:
        module = sys.modules[subject.__module__]
        source = inspect.getsource(subject if subject.__module__ == "__main__" else module)
        held = vars(function) if is_object else inspect.getclosurevars(inspect.unwrap(function)).nonlocals
    except (OSError, TypeError, KeyError, AttributeError):
        return None
    return digest_of_values([source, *bound, {name: _plain(value) for name, value in held.items()}])


def _plain(value: Any) -> Any:
    """The value, if it is one; of a thing, such as a model or a list that grows, the type."""
    return value if value is None or isinstance(value, str | bool | int | float) else type(value).__qualname__
