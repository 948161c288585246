"""Answers of judges on disk, by all that they depend on."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

_SCHEMA = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)"
_AT_ONCE = 500


def answer_key(**told: Any) -> str:
    """The key of an answer: a digest of who is asked, what, and how."""
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


class AnswerStore:
    """A table of answers, shared by the runs of a machine; each call is a transaction of its own.

    Args:
        path: of the file, which is made with its folder.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        with closing(self._open()) as connection, connection:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(_SCHEMA)

    def get(self, keys: Sequence[str]) -> dict[str, list[float]]:
        """The answers that are known."""
        found: dict[str, list[float]] = {}
        with closing(self._open()) as connection:
            for start in range(0, len(keys), _AT_ONCE):
                part = list(keys[start : start + _AT_ONCE])
                marks = ",".join("?" * len(part))
                rows = connection.execute(f"SELECT key, answer FROM answers WHERE key IN ({marks})", part)
                found |= {key: json.loads(answer) for key, answer in rows}
        return found

    def put(self, answers: Mapping[str, Sequence[float]]) -> None:
        """Keep answers."""
        rows = [(key, json.dumps(list(answer))) for key, answer in answers.items()]
        with closing(self._open()) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=60.0)
