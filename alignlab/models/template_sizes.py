"""How much a step of a chat template would make, told before it is made."""

from __future__ import annotations

import re
import string
from collections.abc import ItemsView, KeysView, Mapping, Sequence, Set, ValuesView
from typing import Any

from jinja2.utils import Namespace

from alignlab.errors import DataError

MAX_CHARS = 2**24
"""Of any text that a template makes."""
MAX_SPLIT_CHARS = 2**22
"""Of a text that is cut into a list of its parts, each of which takes much more memory than its characters."""
MAX_ITEMS = 2**20
MAX_NUMBER_BITS = 2**16
MAX_FORMAT_CHARS = 2**16
MAX_SMALL = 100
"""Of a number of digits, and of what is repeated in every line."""
_NUMBER_CHARS = 24
FIX = "use a tokenizer with another chat template, or correct this one"
_PRINTF = re.compile(r"%(?:\([^)]*\))?[#0\- +]*(\*|\d+)?(?:\.(\*|\d+)?)?")
_SPLITS = ("split", "rsplit", "splitlines")
_PADS = ("center", "ljust", "rjust", "zfill")


def check(size: Any, limit: int, what: str) -> None:
    """Refuse a step that would make more than a limit.

    Args:
        size: what it would make; anything but a number is left to the step's own errors.
        what: is counted.

    Raises:
        DataError: with both numbers.
    """
    if isinstance(size, int) and size > limit:
        raise DataError(
            f"a step of a chat template must make at most {limit} {what}, and would make "
            f"{size if size < 10**40 else 'a number of more than 40 digits'}; {FIX}"
        )


def size_of(value: Any, known: dict[int, int] | None = None) -> int:
    """Return about how many characters a value has when it is printed; what lists repeat counts each time.

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
    known = {} if known is None else known
    if id(value) not in known:
        size = 2
        pairs = value.items() if isinstance(value, Mapping) else value
        has_pairs = isinstance(pairs, ItemsView)  # its tuples are made anew, and would give their ids to others
        for part in (each for pair in pairs for each in pair) if has_pairs else value:
            size += 2 + size_of(part, known)
            if size > MAX_CHARS:  # enough to be refused
                break
        known[id(value)] = size
    return known[id(value)]


def check_printf(text: str | bytes, given: Any) -> None:
    """Refuse `text % given` by the widths in the text and the sizes of what is put in.

    Raises:
        DataError: it would write too much, or takes a width from what is given.
    """
    check(len(text), MAX_FORMAT_CHARS, "characters of a format")
    fields = _PRINTF.findall(text if isinstance(text, str) else text.decode("latin-1"))
    if any("*" in field for field in fields):
        raise DataError(f"the chat template formats with a width of *, and must write the width; {FIX}")
    size = len(text) + sum(_number(part) for field in fields for part in field)
    size += len(fields) * _largest(given.values()) if isinstance(given, Mapping) else size_of(given)
    check(size, MAX_CHARS, "characters")


def check_braces(text: str, given: Sequence[Any]) -> None:
    """Refuse `text.format(...)` by the widths in the text and the sizes of what is put in.

    Raises:
        DataError: it would write too much, or takes a width from what is given.
    """
    check(len(text), MAX_FORMAT_CHARS, "characters of a format")
    try:
        specs = [spec or "" for _, field, spec, _ in string.Formatter().parse(text) if field is not None]
    except ValueError:  # which the formatter says itself
        return
    if any("{" in spec for spec in specs):
        raise DataError(f"the chat template formats with a width in braces, and must write the width; {FIX}")
    widths = sum(_number(digits) for spec in specs for digits in re.findall(r"\d+", spec))
    check(len(text) + widths + len(specs) * _largest(given), MAX_CHARS, "characters")


def _number(digits: str) -> int:
    """Return the number, or one beyond all limits of digits that Python would not read."""
    return int(digits) if digits and len(digits) < _NUMBER_CHARS else 10**_NUMBER_CHARS * bool(digits)


def _largest(values: Any) -> int:
    return max(map(size_of, values), default=0)


def check_replacement(text: str | bytes, old: str | bytes, new: str | bytes, count: Any) -> None:
    """Refuse the replacement of all or `count` places of a text by the length of what comes of it.

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
    """Refuse a method of a text or a number by what it would make; returns the arguments to call it with.

    Raises:
        DataError: it would make too much.
    """
    args = tuple(args)
    if isinstance(owner, int):
        if name == "to_bytes":
            check(kwargs.get("length", args[0] if args else 0), MAX_NUMBER_BITS, "bytes of a number")
    elif name in _PADS and args:
        check(args[0], MAX_CHARS, "characters")
    elif name == "expandtabs":
        width = kwargs.get("tabsize", args[0] if args else 8)
        tabs = owner.count("\t" if isinstance(owner, str) else b"\t")  # type: ignore[arg-type]
        check(len(owner) + tabs * width if isinstance(width, int) else 0, MAX_CHARS, "characters")
    elif name == "join" and args:
        args = (list(args[0]), *args[1:])
        check(sum(map(size_of, args[0])) + len(owner) * len(args[0]), MAX_CHARS, "characters")
    elif name == "replace" and len(args) >= 2 and all(isinstance(each, type(owner)) for each in args[:2]):
        count = kwargs.get("count", args[2] if len(args) > 2 else None)
        check_replacement(owner, args[0], args[1], count)
    elif name == "translate" and args and isinstance(args[0], Mapping):
        longest = max((len(each) for each in args[0].values() if isinstance(each, str)), default=1)
        check(len(owner) * longest, MAX_CHARS, "characters")
    elif name in _SPLITS:
        check(len(owner), MAX_SPLIT_CHARS, "characters of a text that is split")
    return args
