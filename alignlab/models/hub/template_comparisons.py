"""Comparisons, searches and keys of a chat template, counted before they are done.

Lists that hold each other twice at every level are small, and to compare two of them takes time without an end, in one
step of C that nothing can stop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from typing import Any

from alignlab.models.hub.template_sizes import MAX_CHARS, check, size_of

MAX_COMPARED = 2**27
"""Characters, or items at about 25 each, that one step may compare: about a second."""
_ORDERS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": operator.eq, "ne": operator.ne,
    "lt": operator.lt, "lteq": operator.le, "gt": operator.gt, "gteq": operator.ge,
}  # fmt: skip
_TESTS = {
    "eq": ("eq", "equalto", "=="), "ne": ("ne", "!="), "lt": ("lt", "lessthan", "<"), "lteq": ("le", "<="),
    "gt": ("gt", "greaterthan", ">"), "gteq": ("ge", ">="), "in": ("in",),
}  # fmt: skip
_WHAT = "comparisons"


def compare(name: str, left: Any, right: Any) -> Any:
    """Return what an operator of Jinja's (`eq`, `lteq`, `in`, `notin`, ...) gives.

    Raises:
        DataError: it would compare too much.
    """
    if name in ("in", "notin"):
        return _contains(left, right) == (name == "in")
    if _holds_others(left) and _holds_others(right):
        check(min(size_of(left), size_of(right)), MAX_CHARS, _WHAT)
    return _ORDERS[name](left, right)


def comparing_tests() -> dict[str, Callable[[Any, Any], Any]]:
    """Return Jinja's tests that compare (`is eq`, `select("in", ...)`), by their names, counted."""
    return {alias: _test(name) for name, aliases in _TESTS.items() for alias in aliases}


def _test(name: str) -> Callable[[Any, Any], Any]:
    def test(left: Any, right: Any) -> Any:
        return compare(name, left, right)

    return test


def _contains(item: Any, container: Any) -> bool:
    if isinstance(container, Iterator):
        return any(item is other or compare("eq", item, other) for other in container)
    check_search(item, container)
    return bool(item in container)


def check_search(item: Any, container: Any) -> None:
    """Refuse a search for an item in a container by how much is compared or hashed.

    Raises:
        DataError: it is too much.
    """
    if isinstance(container, list | tuple):
        size = size_of(item)
        if size > MAX_CHARS or len(container) * size > MAX_COMPARED:
            check(size_of(container), MAX_CHARS, _WHAT)
    elif _holds_others(container):
        check_key(item)


def check_key(key: Any) -> None:
    """Refuse a key that takes too much to hash.

    Raises:
        DataError: it does.
    """
    if isinstance(key, tuple):
        check(size_of(key), MAX_CHARS, "items of a key")


def dict_of(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, Any]:
    """Return a dict of a template's pairs.

    Raises:
        DataError: a key takes too much to hash.
    """
    made = {}
    for key, value in pairs:
        check_key(key)
        made[key] = value
    return made


def check_sorting(values: list[Any]) -> None:
    """Refuse to sort values, or to find the least of them, by how much is compared.

    Raises:
        DataError: it is too much.
    """
    size = size_of(values)
    check(size, MAX_CHARS, _WHAT)
    check(size * len(values).bit_length(), MAX_COMPARED, _WHAT)


def _holds_others(value: Any) -> bool:
    return isinstance(value, list | tuple | Mapping | Set)
