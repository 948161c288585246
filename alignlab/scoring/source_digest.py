"""Digest by which a resumed run recognises the same reward function: its source and the values bound to it."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from alignlab.files.digests import digest_of_values


def source_digest(function: Callable[..., Any]) -> str | None:
    """Return a digest of a reward function; None where Python does not know its source.

    The digest covers the source of the function's file (in the main program, of the function alone) and the plain
    values bound to it: by `functools.partial`, in a closure, as attributes of an object. An isolated reward is not
    imported here; its process has computed the digest.
    """
    if hasattr(function, "isolated_source"):
        computed_there: str | None = function.isolated_source
        return computed_there
    bound: list[Any] = []
    while isinstance(function, functools.partial):
        bound.append([*map(_plain, function.args), {name: _plain(value) for name, value in function.keywords.items()}])
        function = function.func
    is_object = not (inspect.isroutine(function) or inspect.isclass(function))
    subject = type(function) if is_object else function
    try:
        module = sys.modules[subject.__module__]
        source = inspect.getsource(subject if subject.__module__ == "__main__" else module)
        attributes = vars(function) if is_object else inspect.getclosurevars(inspect.unwrap(function)).nonlocals
    except (OSError, TypeError, KeyError, AttributeError):
        return None
    return digest_of_values([source, *bound, {name: _plain(value) for name, value in attributes.items()}])


def _plain(value: Any) -> Any:
    """Return a number, a text or None as it is, and the type of any other object, such as a model."""
    return value if value is None or isinstance(value, str | bool | int | float) else type(value).__qualname__
