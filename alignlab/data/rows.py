"""Normalisation of rows: missing values, damaged rows, labels and numbers."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from numbers import Real
from typing import Any

from alignlab.config.data import RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.nesting import MAX_DEPTH, is_too_deep
from alignlab.errors import DataError

_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LABELS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
TEXT_COLUMNS = ("messages", "completion", "chosen", "rejected", "tools", "chat_template_kwargs")
"""Columns of text beside the prompt, and columns that chat templates read."""
MAX_TEXT_CHARS = 2**22
"""Largest number of characters in one column of text of a row: about a million tokens."""
MAX_CHARS_PER_TOKEN = 256
"""More characters than any token stands for, apart from spaces."""
_MISSING_OF_PANDAS = ("NAType", "NaTType")
_EXACT_BELOW = 2.0**53  # a float64 holds every whole number below this


@dataclass(frozen=True)
class DamagedRow:
    """Stands in for a row that could not be read from its file.

    Attributes:
        message: description of the damage with the line of the file, to complete "row 3 ...".
    """

    message: str


def plain_row(row: Any) -> dict[str, Any]:
    """Return a row as a dict, with None for missing values: NaN, and pandas' NA and NaT.

    Arrays of objects, into which pandas turns lists, become lists again; so do all arrays in columns of text.

    Raises:
        BadRow: the row is damaged, no mapping of names to values, or nested too deeply.
    """
    if isinstance(row, DamagedRow):
        raise BadRow("damaged", row.message)
    if not isinstance(row, Mapping):
        raise BadRow("wrong_type", f"is {type(row).__name__}, and must be a dict such as {{'prompt': ...}}")
    for name in row:
        if not isinstance(name, str):
            raise BadRow("wrong_type", f"has a column called {name!r} ({type(name).__name__}); names must be strings")
    deep = next((name for name, value in row.items() if is_too_deep(value)), None)
    if deep is not None:
        raise BadRow("wrong_type", f"is nested deeper than {MAX_DEPTH} levels in the column {deep!r}; write it flatter")
    return {name: _plain_value(value, name) for name, value in row.items()}


def check_text_sizes(row: Mapping[str, Any], prompt_column: str, max_prompt_tokens: int | None = None) -> None:
    """Refuse a row whose texts are far too long for any model, before they are processed.

    Raises:
        BadRow: a column of text has more than `MAX_TEXT_CHARS` characters, or the prompt has more than
            `max_prompt_tokens` tokens can stand for.
    """
    for name in (prompt_column, *TEXT_COLUMNS):
        limit, rule = MAX_TEXT_CHARS, "a column of text has"
        if name == prompt_column and max_prompt_tokens is not None:
            tokens = max_prompt_tokens * MAX_CHARS_PER_TOKEN
            limit, rule = min((limit, rule), (tokens, f"{max_prompt_tokens} tokens (max_prompt_tokens) have"))
        size = _num_chars(row.get(name))
        if size > limit:
            raise BadRow("too_long", f"has {size} characters in {name!r}, and {rule} at most {limit}; shorten it")


def _num_chars(value: Any) -> int:
    """Return the number of characters of all texts in a value, which is not nested too deeply."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(_num_chars(key) + _num_chars(held) for key, held in value.items())
    return sum(map(_num_chars, value)) if isinstance(value, list | tuple) else 0


def _plain_value(value: Any, name: str) -> Any:
    if is_missing(value):
        return None
    if name in TEXT_COLUMNS or (_is_array(value) and value.dtype == object):
        return without_arrays(value)
    return value


def without_arrays(value: Any) -> Any:
    """Return a structure with lists in place of arrays."""
    if isinstance(value, Mapping):
        return {key: without_arrays(held) for key, held in value.items()}
    if _is_array(value):
        value = value.tolist()
    return [without_arrays(held) for held in value] if isinstance(value, list | tuple) else value


def _is_array(value: Any) -> bool:
    return getattr(value, "ndim", 0) > 0 and hasattr(value, "tolist") and hasattr(value, "dtype")


def is_missing(value: Any) -> bool:
    """Return True for values that mean "missing": None, NaN, and pandas' NA and NaT."""
    if value is None or type(value).__name__ in _MISSING_OF_PANDAS:
        return True
    if isinstance(value, Decimal):
        return value.is_nan()
    if isinstance(value, float):  # numpy.float64 too
        return value != value
    return getattr(value, "ndim", None) == 0 and hasattr(value, "item") and bool(value != value)


def as_label(value: Any, column: str) -> bool:
    """Return a label: true or false, 1 or 0 (also 1.0 and 0.0), also as text, because all values of CSV files are text.

    Raises:
        BadRow: any other value, such as the -1 of labels that are +1 and -1.
    """
    raw = scalar(value)
    label: bool | None = None
    if isinstance(raw, str):
        label = _LABELS.get(raw.strip().lower())
    elif isinstance(raw, bool) or (isinstance(raw, Real | Decimal) and raw in (0, 1)):
        label = bool(raw)
    if label is None:
        raise BadRow(
            "wrong_type",
            f"has {shown(value)} in the column {column!r}, which holds true or false, 1 or 0, as values or as text; "
            "write 1 for a good completion and 0 for a bad one",
        )
    return label


def as_number(value: Any, column: str) -> float:
    """Return a number, also from text such as 0.5, -3 or 1e-3, because all values of CSV files are text.

    Raises:
        BadRow: the value is no number, or text of another form, such as "1,5", "50%" or "1_000".
    """
    number = scalar(value)
    if isinstance(number, str) and _NUMBER.fullmatch(number.strip()):
        return float(number)
    if isinstance(number, bool) or not isinstance(number, Real | Decimal | Fraction):
        raise BadRow(
            "wrong_type",
            f"has {shown(value)} in the column {column!r}, which holds numbers; write them as 0.5, -3 or 1e-3",
        )
    try:
        return float(number)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def shown(value: Any) -> str:
    """Return a value as messages quote it; the type of an integer that Python refuses to write."""
    try:
        return f"{value!r:.80}"
    except ValueError:
        return f"a value of type {type(value).__name__}"


def scalar(value: Any) -> Any:
    """Return a single number of numpy or torch as a Python number; any other value unchanged."""
    return value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value


def readable_rows(rows: Iterable[Any], settings: RenderSettings) -> list[Any]:
    """Return the first `settings.size` rows, with integers in columns that a table has turned into floats.

    pandas stores a column of integers with missing values as floats, 72 as 72.0, also in Parquet and JSON.

    Raises:
        DataError: `rows` is a mapping, or a row of a table cannot be decoded.
    """
    if isinstance(rows, Mapping):
        raise DataError(
            f"{settings.source} must be rows, and is a mapping of {', '.join(map(str, rows))}; give one split, or a "
            "list of dicts"
        )
    if is_arrow(rows):
        rows = _arrow_rows(rows, settings)
    selected = list(itertools.islice(rows, settings.size))
    names = _integer_columns([row for row in selected if isinstance(row, Mapping)])
    if not names:
        return selected
    return [_with_integers(row, names) if isinstance(row, Mapping) else row for row in selected]


def _integer_columns(rows: list[Mapping[str, Any]]) -> list[str]:
    """Return the names of columns whose integers became floats because values are missing."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if is_gapped(row.get(name) for row in rows)]


def is_gapped(values: Iterable[Any]) -> bool:
    """Return True if some values are missing and all others are floats without a fraction."""
    is_any_missing = is_any_number = False
    for value in values:
        if is_missing(value):
            is_any_missing = True
        elif isinstance(value, float) and value.is_integer() and abs(value) < _EXACT_BELOW:
            is_any_number = True
        else:
            return False
    return is_any_missing and is_any_number


def _with_integers(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return dict(row) | {name: int(row[name]) for name in names if not is_missing(row.get(name))}


def is_arrow(rows: Any) -> bool:
    """Return True for a `datasets.Dataset`, without importing `datasets`."""
    return any(f"{kind.__module__}.{kind.__name__}" == "datasets.arrow_dataset.Dataset" for kind in type(rows).__mro__)


def _arrow_rows(rows: Any, settings: RenderSettings) -> Iterator[Any]:
    for index in range(len(rows)):
        try:
            row = rows[index]
        except Exception as error:  # decoders of images and sounds raise any kind of error
            raise DataError(
                f"{settings.source}: row {index} (the first is 0) cannot be decoded: {error}; remove the columns that "
                "hold no text"
            ) from error
        yield row
