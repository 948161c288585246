"""Estimates of how much a step of a chat template will make, before it runs, and limits on that."""

from __future__ import annotations

import itertools
import re
import string
from collections.abc import Callable, ItemsView, KeysView, Mapping, Sequence, Set, ValuesView
from typing import Any

from jinja2.utils import Namespace

from alignlab.errors import DataError

MAX_CHARS = 2**24
"""Characters of any text that a template makes."""
MAX_SPLIT_CHARS = 2**22
"""Characters of a text that is split into a list, whose items take much more memory than their characters."""
MAX_ITEMS = 2**20
MAX_NUMBER_BITS = 2**16
MAX_FORMAT_CHARS = 2**16
MAX_SMALL = 100
"""Digits of a rounded number, and characters that are repeated on every line."""
MAX_SEARCHED = 2**30
"""Characters of a text times characters that are searched for, where a search may compare each with each."""
_NUMBER_CHARS = 24
FIX = "use a tokenizer with another chat template, or correct this one"
_PRINTF = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?")


def check(size: Any, limit: int, unit: str) -> None:
    """Raise if a step would make more than a limit.

    Args:
        size: of the result; if it is no number, the step raises its own error later.
        unit: of size and limit, such as "characters".

    Raises:
        DataError: with both numbers.
    """
    if isinstance(size, int) and size > limit:
        raise DataError(
            f"a step of a chat template must make at most {limit} {unit}, and would make "
            f"{size if size < 10**40 else 'a number of more than 40 digits'}; {FIX}"
        )


def size_of(value: Any, sizes: dict[int, int] | None = None) -> int:
    """Return about how many characters a value has when it is printed; a value that a list repeats counts each time.

    Args:
        sizes: of values that were seen before, by their id.

    Raises:
        RecursionError: it is nested too deeply.
    """
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return _NUMBER_CHARS + value.bit_length() // 3
    if isinstance(value, Namespace):
        value = object.__getattribute__(value, "_Namespace__attrs")
    if not isinstance(value, Mapping | list | tuple | Set | KeysView | ItemsView | ValuesView):
        return _NUMBER_CHARS
    sizes = {} if sizes is None else sizes
    if id(value) not in sizes:
        sizes[id(value)] = _size_of_items(value, sizes)
    return sizes[id(value)]


def _size_of_items(values: Any, sizes: dict[int, int]) -> int:
    """Return the size of a list or mapping; of one beyond the limit, a number that is enough for a refusal."""
    pairs = values.items() if isinstance(values, Mapping) else values
    # The tuples of an items view are new ones, whose ids may be used again: their parts are counted, not they.
    items = itertools.chain.from_iterable(pairs) if isinstance(pairs, ItemsView) else values
    size = 2
    for item in items:
        size += 2 + size_of(item, sizes)
        if size > MAX_CHARS:
            break
    return size


def check_printf(text: str | bytes, values: Any) -> None:
    """Raise if `text % values` would write too much, by the widths in the text and the sizes of the values.

    Raises:
        DataError: it would write too much, or takes a width from the values.
    """
    check(len(text), MAX_FORMAT_CHARS, "characters of a format")
    fields = _PRINTF.findall(text if isinstance(text, str) else text.decode("latin-1"))
    if any("*" in field for field in fields):
        raise DataError(f"the chat template formats with a width of *, and must write the width; {FIX}")
    size = len(text) + sum(_number(digits) for field in fields for digits in field)
    size += len(fields) * _largest(values.values()) if isinstance(values, Mapping) else size_of(values)
    check(size, MAX_CHARS, "characters")


def check_braces(text: str, values: Sequence[Any]) -> None:
    """Raise if `text.format(...)` would write too much, by the widths in the text and the sizes of the values.

    Raises:
        DataError: it would write too much, or takes a width from the values.
    """
    check(len(text), MAX_FORMAT_CHARS, "characters of a format")
    try:
        specs = [spec or "" for _, field, spec, _ in string.Formatter().parse(text) if field is not None]
    except ValueError:  # the formatter will raise it
        return
    if any("{" in spec for spec in specs):
        raise DataError(f"the chat template formats with a width in braces, and must write the width; {FIX}")
    widths = sum(_number(digits) for spec in specs for digits in re.findall(r"\d+", spec))
    check(len(text) + widths + len(specs) * _largest(values), MAX_CHARS, "characters")


def _number(digits: str) -> int:
    """Return the number, or for more digits than Python reads one beyond all limits."""
    return int(digits) if digits and len(digits) < _NUMBER_CHARS else 10**_NUMBER_CHARS * bool(digits)


def _largest(values: Any) -> int:
    return max(map(size_of, values), default=0)


def check_replacement(text: str | bytes, old: str | bytes, new: str | bytes, count: Any) -> None:
    """Raise if the replacement of all, or of `count`, places of a text would make it too long.

    Raises:
        DataError: it would be too long.
    """
    places = text.count(old)  # type: ignore[arg-type]
    if isinstance(count, int) and count >= 0:
        places = min(places, count)
    check(len(text) + places * (len(new) - len(old)), MAX_CHARS, "characters")


def check_method(
    owner: str | bytes | int, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Raise if a method of a text or a number would make too much; return the arguments to call it with.

    Raises:
        DataError: it would make too much.
    """
    check_arguments = (_NUMBER_METHODS if isinstance(owner, int) else _TEXT_METHODS).get(name)
    return tuple(args) if check_arguments is None else check_arguments(owner, tuple(args), kwargs)


_Args = tuple[Any, ...]
_Kwargs = Mapping[str, Any]


def _argument(args: _Args, kwargs: _Kwargs, index: int, name: str, default: Any) -> Any:
    return kwargs.get(name, args[index] if len(args) > index else default)


def _check_to_bytes(owner: int, args: _Args, kwargs: _Kwargs) -> _Args:
    check(_argument(args, kwargs, 0, "length", 0), MAX_NUMBER_BITS, "bytes of a number")
    return args


def _check_padding(owner: str | bytes, args: _Args, kwargs: _Kwargs) -> _Args:
    check(args[0] if args else 0, MAX_CHARS, "characters")
    return args


def _check_expandtabs(owner: Any, args: _Args, kwargs: _Kwargs) -> _Args:
    width = _argument(args, kwargs, 0, "tabsize", 8)
    tabs = owner.count("\t" if isinstance(owner, str) else b"\t")
    check(len(owner) + tabs * width if isinstance(width, int) else 0, MAX_CHARS, "characters")
    return args


def _check_join(owner: str | bytes, args: _Args, kwargs: _Kwargs) -> _Args:
    if not args:
        return args
    texts = list(args[0])  # a generator can be read once
    check(sum(map(size_of, texts)) + len(owner) * len(texts), MAX_CHARS, "characters")
    return (texts, *args[1:])


def _check_replace(owner: str | bytes, args: _Args, kwargs: _Kwargs) -> _Args:
    if len(args) >= 2 and all(isinstance(text, type(owner)) for text in args[:2]):
        check_replacement(owner, args[0], args[1], _argument(args, kwargs, 2, "count", None))
    return args


def _check_translate(owner: str | bytes, args: _Args, kwargs: _Kwargs) -> _Args:
    if args and isinstance(args[0], Mapping):
        longest = max((len(text) for text in args[0].values() if isinstance(text, str)), default=1)
        check(len(owner) * longest, MAX_CHARS, "characters")
    return args


def _check_split(owner: str | bytes, args: _Args, kwargs: _Kwargs) -> _Args:
    check(len(owner), MAX_SPLIT_CHARS, "characters of a text that is split")
    return _check_search(owner, args, kwargs)


def _check_search(owner: str | bytes, args: _Args, kwargs: _Kwargs) -> _Args:
    """Check a search from the end, or for any of some characters: it may look at each place for each character."""
    searched = _argument(args, kwargs, 0, "sep", None)
    if isinstance(searched, str | bytes):
        check(len(owner) * len(searched), MAX_SEARCHED, "comparisons of characters")
    return args


def _check_affix(owner: str | bytes, args: _Args, kwargs: _Kwargs) -> _Args:
    check(sum(map(size_of, args)), MAX_CHARS, "comparisons of characters")
    return args


_NUMBER_METHODS: dict[str, Callable[[Any, _Args, _Kwargs], _Args]] = {"to_bytes": _check_to_bytes}
_TEXT_METHODS: dict[str, Callable[[Any, _Args, _Kwargs], _Args]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), _check_padding),
    **dict.fromkeys(("split", "rsplit", "splitlines"), _check_split),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "strip", "lstrip", "rstrip"), _check_search),
    **dict.fromkeys(("startswith", "endswith"), _check_affix),
    "expandtabs": _check_expandtabs, "join": _check_join, "replace": _check_replace, "translate": _check_translate,
}  # fmt: skip
