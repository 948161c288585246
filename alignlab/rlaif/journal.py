"""Rows of JSON that are kept as they come, so that long work with a judge goes on where it was stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignlab.errors import DataError
from alignlab.training.files import write_atomically


class Journal:
    """A JSONL file that only grows; each `append` is on the disk when it returns.

    A last line that a crash left half written is cut off when the journal is opened.

    Args:
        path: of the file, made with its folder if absent.

    Attributes:
        rows: all that were appended, in order, those of earlier processes among them.

    Raises:
        DataError: a line before the last is no JSON.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self.rows: list[dict[str, Any]] = []
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with path.open("r+b") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(f"{path}, line {number}, is no JSON: {error}; remove the line") from error

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows."""
        with self._path.open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += [dict(row) for row in rows]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file whole, or not at all."""
    write_atomically(path, "".join(json.dumps(dict(row)) + "\n" for row in rows))
