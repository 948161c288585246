"""Rows of JSON that are kept as they come, so that long work with a model or a judge goes on where it was stopped.

A journal is a JSONL file. Each line holds a row, its number in the file ("line") and its digest ("sha256"), so that a
line which is damaged, missing, copied or out of its order is found:

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

from alignlab.atomic_files import make_folder, write_atomically
from alignlab.digests import SHA256, DamagedError, sealed, unsealed
from alignlab.library_errors import writing

NUMBER = "line"


@dataclass
class JournalContent:
    """What a journal's file holds.

    Attributes:
        rows: of the lines that are as they were written, in order.
        numbers: of these lines, in the file.
        ends: bytes of the file up to the end of each of these lines.
        damage: what is wrong with the file, a sentence for each place; empty for an intact file. A last line that is
            cut short, as by a crash, is no damage.
        has_digests: False for a file of an earlier version, whose lines are taken as they are.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    damage: list[str] = field(default_factory=list)
    has_digests: bool = True

    @property
    def num_intact(self) -> int:
        """How many rows come before the first that is damaged or missing."""
        return sum(number == position for position, number in enumerate(self.numbers, start=1))

    def add(self, row: dict[str, Any], number: int, end: int) -> None:
        """Add an intact line."""
        self.rows.append(row)
        self.numbers.append(number)
        self.ends.append(end)


class Journal:
    """A file of rows that only grows; each `append` is on the disk when it returns.

    A last line that a crash left half written is cut off when the journal is opened. Damaged lines are taken out of the
    file, which is kept beside it as `<name>.damaged`.

    Args:
        path: of the file, made with its folder if absent.

    Attributes:
        rows: all that were appended, in order, those of earlier processes among them.
    """

    def __init__(self, path: Path) -> None:
        make_folder(path.parent)
        self._path = path
        content = read_journal(path)
        self.rows = content.rows
        if content.damage:
            shutil.copyfile(path, path.with_name(f"{path.name}.damaged"))
        if content.damage or not content.has_digests:
            write_atomically(path, journal_lines(content.rows))
        elif path.exists():
            os.truncate(path, content.ends[-1] if content.ends else 0)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows."""
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
    """Return what a journal's file holds; nothing where there is no file."""
    if not path.exists():
        return JournalContent()
    data = path.read_bytes()
    lines = data[: data.rfind(b"\n") + 1].split(b"\n")[:-1]
    values = [_parsed(line) for line in lines]
    ends = list(accumulate(len(line) + 1 for line in lines))
    found = [value for value in values if isinstance(value, dict)]
    if found and not any(SHA256 in value or NUMBER in value for value in found):
        return _without_digests(values, ends)
    content = JournalContent()
    unread = 0  # lines since the last good one
    for position, (value, end) in enumerate(zip(values, ends, strict=True), start=1):
        last = content.numbers[-1] if content.numbers else 0
        try:
            row = unsealed(value)
            number = row.pop(NUMBER)
        except (DamagedError, KeyError) as error:
            content.damage.append(f"line {position} is damaged ({error})")
            unread += 1
            continue
        if number <= last:
            content.damage.append(f"line {position} stands a second time, or out of its order")
            continue
        if number > last + 1 + unread:
            content.damage.append(f"{number - last - 1 - unread} lines are missing before line {position}")
        content.add(row, number, end)
        unread = 0
    return content


def _without_digests(values: Sequence[Any], ends: Sequence[int]) -> JournalContent:
    """The content of a file that an earlier version wrote: lines are taken as they are, as far as they are rows."""
    content = JournalContent(has_digests=False)
    for position, (value, end) in enumerate(zip(values, ends, strict=True), start=1):
        if isinstance(value, dict):
            content.add(value, position, end)
        else:
            content.damage.append(f"line {position} is damaged (it is no JSON object)")
    return content


def _parsed(line: bytes) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None



def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file whole, or not at all, for others to read."""
    write_atomically(path, "".join(json.dumps(dict(row)) + "\n" for row in rows))
