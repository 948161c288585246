"""A journal of finished rows, so that long work with a model or a judge resumes where it was stopped.

A journal is a JSONL file. Each line holds a row, its number in the file ("line") and its digest ("sha256"), so that a
line which is damaged, missing, copied or out of order is noticed:

    {"sha256": "5d41...", "line": 3, "index": 2, "prompt": "2 + 2 =", ...}
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

from alignlab.files.atomic_files import make_folder, write_atomically
from alignlab.files.digests import SHA256, DamagedError, sealed, unsealed
from alignlab.files.library_errors import reading, writing

NUMBER = "line"


@dataclass
class JournalContent:
    """Content of a journal's file.

    Attributes:
        rows: rows of the intact lines, in order.
        numbers: numbers of these lines in the file, from 1.
        ends: size of the file, in bytes, up to the end of each of these lines.
        damage: a sentence for each damaged place; empty for an intact file. A last line that a crash cut short does
            not count as damage.
        has_digests: False for a file of an earlier version, whose lines cannot be verified.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    has_digests: bool = True

    @property
    def num_intact(self) -> int:
        """Number of rows before the first damaged or missing one."""
        return sum(number == position for position, number in enumerate(self.numbers, start=1))

    def add(self, row: dict[str, Any], number: int, end: int) -> None:
        """Add an intact line."""
        self.rows.append(row)
        self.numbers.append(number)
        self.ends.append(end)


class Journal:
    """A file of rows that only grows; appended rows are on the disk when `append` returns.

    A last line that a crash left half written is cut off when the journal is opened. Damaged lines are taken out; a
    copy of the file with them is kept as `<name>.damaged`.

    Args:
        path: the file; created with its folder if absent.
        in_order: True if the position of a row identifies it; then all rows after the first damaged one are taken out.

    Attributes:
        rows: all rows in order, also those that earlier processes appended.
        damage: a sentence for each place that was found damaged when the journal was opened.
    """

    def __init__(self, path: Path, *, in_order: bool = False) -> None:
        make_folder(path.parent)
        self._path = path
        content = read_journal(path)
        self.rows = content.rows[: content.num_intact] if in_order else content.rows
        self.damage = content.damage
        if content.damage:
            shutil.copyfile(path, path.with_name(f"{path.name}.damaged"))
        if (content.damage or not content.has_digests) and not in_order:
            write_atomically(path, journal_lines(self.rows))
        elif path.exists():  # in place, so that a lock on the file stays a lock
            os.truncate(path, content.ends[len(self.rows) - 1] if self.rows else 0)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to the file and to `rows`."""
        with writing(self._path, "the journal"), self._path.open("ab") as file:
            file.write(journal_lines(rows, first=len(self.rows) + 1).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += [dict(row) for row in rows]


def journal_lines(rows: Iterable[Mapping[str, Any]], *, first: int = 1) -> str:
    """Return the lines of rows, numbered from `first`."""
    return "".join(
        json.dumps(sealed({NUMBER: number, **row})) + "\n" for number, row in enumerate(rows, start=first)
    )


def read_journal(path: Path) -> JournalContent:
    """Return the content of a journal's file; an empty one if there is no file.

    Raises:
        DiskError: the file cannot be read, or a folder stands in its place.
    """
    if not path.exists():
        return JournalContent()
    with reading(path, "the journal"):
        data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
    values = [_parsed(line) for line in lines]
    ends = list(accumulate(len(line) + 1 for line in lines))
    if _is_without_digests(values):
        return _content_without_digests(values, ends)
    content = JournalContent()
    num_damaged = 0  # lines since the last intact one: some of the missing numbers may have been theirs
    for position, (value, end) in enumerate(zip(values, ends, strict=True), start=1):
        try:
            row = unsealed(value)
            number = row.pop(NUMBER)
        except (DamagedError, KeyError) as error:
            content.damage.append(f"line {position} is damaged ({error})")
            num_damaged += 1
            continue
        previous = content.numbers[-1] if content.numbers else 0
        if number <= previous:
            content.damage.append(f"line {position} stands a second time, or out of its order")
            continue
        num_missing = number - previous - 1 - num_damaged
        if num_missing > 0:
            content.damage.append(f"{num_missing} lines are missing before line {position}")
        content.add(row, number, end)
        num_damaged = 0
    return content


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file of rows without digests, for other programs; it is whole or absent."""
    write_atomically(path, "".join(json.dumps(dict(row)) + "\n" for row in rows))


def _is_without_digests(values: Sequence[Any]) -> bool:
    """Return True for the lines of a file that an earlier version wrote."""
    rows = [value for value in values if isinstance(value, dict)]
    return bool(rows) and not any(SHA256 in row or NUMBER in row for row in rows)


def _content_without_digests(values: Sequence[Any], ends: Sequence[int]) -> JournalContent:
    content = JournalContent(has_digests=False)
    for position, (value, end) in enumerate(zip(values, ends, strict=True), start=1):
        if isinstance(value, dict):
            content.add(value, position, end)
        else:
            content.damage.append(f"line {position} is damaged (it is no JSON object)")
    return content


def _parsed(line: bytes) -> Any:
    """Return the JSON of a line; None if it is none."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
