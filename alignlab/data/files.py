"""Rows of local files: JSON lines, JSON, CSV and Parquet; the first three also packed with gzip.

A `DamagedRow` stands in for a row that cannot be read, so that the others can be.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from alignlab.data.file_limits import MAX_ROW_BYTES, LimitedReader, check_table, limited_lines, unpacked_limit
from alignlab.data.rows import DamagedRow
from alignlab.errors import DataError

Rows = Iterable[Any]
"""Mappings, and a `DamagedRow` for each row that cannot be read."""
_UTF8_MARK = b"\xef\xbb\xbf"
_OTHER_MARKS = (b"\xff\xfe", b"\xfe\xff")  # UTF-16, and little-endian UTF-32
_READ_BYTES = 2**20
_OTHER_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


class _TwiceNamed(ValueError):
    """A JSON object has a key twice, so that one of its values would be lost."""


def file_rows(path: str) -> Rows:
    """Return the rows of a file, whose kind is the ending of its name.

    Raises:
        DataError: there is no such file, it cannot be read, or its ending is unknown.
    """
    kind = file_kind(path)
    if not Path(path).is_file():
        raise DataError(f"the path of the data must be an existing file, and {path} is none; correct the path")
    reader = READERS.get(kind)
    if reader is None:
        raise DataError(
            f"the path of the data must be a file of a kind that is known, and {path} is "
            f"{kind or 'none by its name'}; use "
            f"{', '.join(READERS)}, the first three also with .gz"
        )
    return reader(path)


def file_kind(path: str) -> str:
    """Return the ending of a file's name in lower case, ignoring `.gz`."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """Open a file of UTF-8 text after its byte-order mark, unpacked up to `unpacked_limit` bytes.

    Raises:
        DataError: the file cannot be read, is damaged, unpacks to more bytes, or is no UTF-8.
    """
    is_packed = path.lower().endswith(".gz")
    try:
        with gzip.open(path) if is_packed else open(path, "rb") as source:
            limit = unpacked_limit(Path(path).stat().st_size, is_packed=is_packed)
            if is_packed:  # before its rows are read, of which there may be millions
                _unpack(cast("BinaryIO", source), limit, path)
            file = io.BufferedReader(LimitedReader(cast("BinaryIO", source), limit, path))
            begin = file.peek(len(_UTF8_MARK))
            if begin.startswith(_OTHER_MARKS):
                raise DataError(f"{path} must be text in UTF-8, and is UTF-16 or UTF-32 by its first bytes; convert it")
            if begin.startswith(_UTF8_MARK):
                file.read(len(_UTF8_MARK))
            yield cast("BinaryIO", file)
    except UnicodeDecodeError as error:
        raise DataError(f"{path} must be text in UTF-8, and is not: {error}; convert it") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}; correct the path, or write the file again") from error


def _unpack(source: BinaryIO, limit: int, path: str) -> None:
    """Unpack a file without keeping it, up to `limit` bytes."""
    reader, block = LimitedReader(source, limit, path), bytearray(_READ_BYTES)
    while reader.readinto(block):
        pass
    source.seek(0)


def _jsonl_rows(path: str) -> Iterator[Mapping[str, Any] | DamagedRow]:
    """Yield rows line by line: Arrow's reader would refuse the whole file for one damaged line, without its number."""
    with _opened(path) as file:
        lines = (line for block in limited_lines(file) for line in block.rstrip(b"\r\n").split(b"\r"))
        for number, line in enumerate(lines, start=1):
            if len(line) > MAX_ROW_BYTES:
                yield DamagedRow(f"is no row: line {number} must have at most {MAX_ROW_BYTES} bytes, and has more")
            elif line.strip():
                yield _json_object(line, number)


def _json_object(line: bytes, number: int) -> Mapping[str, Any] | DamagedRow:
    place = f"is no row: line {number} must be a JSON object, and"
    try:
        row = read_json(line.decode())
    except UnicodeDecodeError as error:
        return DamagedRow(f"{place} must be text in UTF-8, and is not: {error}")
    except (ValueError, RecursionError) as error:
        return DamagedRow(f"{place} {_why(error)}")
    return row if isinstance(row, dict) else DamagedRow(f"{place} is {type(row).__name__}")


def read_json(text: str) -> Any:
    """Return the value of a JSON text in which no object has a key twice.

    Raises:
        ValueError, RecursionError: the text is no JSON, has a key twice or a huge number, or is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise _TwiceNamed(_most_common(key for key, _ in pairs))
    return row


def _most_common(names: Iterable[str]) -> str:
    return Counter(names).most_common(1)[0][0]


def _why(error: Exception) -> str:
    """Return the reason why a text is no JSON, to complete "must be JSON, and"."""
    if isinstance(error, _TwiceNamed):
        return f"has the key {str(error)!r} twice"
    return f"is not JSON: {'it is nested too deeply' if isinstance(error, RecursionError) else error}"


def _json_rows(path: str) -> list[Any]:
    with _opened(path) as file:
        text = file.read().decode()
    try:
        rows = read_json(text)
    except (ValueError, RecursionError) as error:
        lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
        fix = "where it holds one object a line, call it .jsonl" if lines else "correct the file"
        raise DataError(f"{path} must be a JSON list of objects, and {_why(error)}; {fix}") from error
    if isinstance(rows, list):
        return rows
    lists = [key for key, value in rows.items() if isinstance(value, list)] if isinstance(rows, dict) else []
    fix = f"write the list of {lists[0]!r} alone" if lists else "use .jsonl for one object a line"
    raise DataError(f"{path} must be a JSON list of objects, and is {type(rows).__name__}; {fix}")


def _csv_rows(path: str) -> Iterator[Mapping[str, Any] | DamagedRow]:
    """Yield rows whose values are all text, so that an answer "007" is unchanged; an empty field is a missing value."""
    csv.field_size_limit(MAX_ROW_BYTES)
    with _opened(path) as file:
        reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8", newline=""), strict=True)
        try:
            header = next((row for row in reader if row), [])
        except csv.Error as error:
            raise DataError(f"{path} must begin with a line of names, and does not: {error}; correct it") from error
        _check_header(path, header)
        yield from _csv_body(reader, header)


def _csv_body(reader: Any, header: list[str]) -> Iterator[Mapping[str, Any] | DamagedRow]:
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            fix = 'put a field with quotes in it into quotes, and write each of them twice ("")'
            yield DamagedRow(f"is no row of CSV, up to line {reader.line_num}: {error}; {fix}")
            continue
        if len(fields) == len(header):
            yield {name: field or None for name, field in zip(header, fields, strict=True)}
        elif fields:
            few = len(fields) < len(header)
            fix = "write a comma for each field that is empty" if few else "put fields that hold commas in quotes"
            yield DamagedRow(
                f"has {'fewer' if few else 'more'} fields than the header names; {fix} (line {reader.line_num}: "
                f"{len(fields)}, and not {len(header)})"
            )


def _check_header(path: str, header: list[str]) -> None:
    """Refuse a header with a duplicate name, or with another separator than commas.

    Raises:
        DataError: with the name or the separator.
    """
    if len(set(header)) < len(header):
        name = _most_common(header)
        raise DataError(f"{path} has the column {name!r} twice, and one of the two would be lost; rename or remove one")
    separators = [word for sign, word in _OTHER_DELIMITERS.items() if len(header) == 1 and sign in header[0]]
    if separators:
        raise DataError(
            f"{path} must have commas between its fields, and has {separators[0]}: its only column is {header[0]!r}; "
            "write it with commas"
        )


def _parquet_rows(path: str) -> Rows:
    from datasets import Dataset

    try:
        check_table(path)
        return Dataset.from_parquet(path)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{path} must be a Parquet file, and cannot be read: {error}; write it again") from error


READERS: dict[str, Callable[[str], Rows]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}
