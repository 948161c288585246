"""Answers of judges on disk, by all that they depend on; a damaged answer is dropped, and asked for again."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

from alignlab.atomic_files import make_folder
from alignlab.digests import json_digest
from alignlab.library_errors import writing

logger = logging.getLogger(__name__)
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS sealed_answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, sha256 TEXT NOT NULL) "
    "WITHOUT ROWID"
)
_WORK_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS work (key TEXT PRIMARY KEY, work TEXT NOT NULL, attempts INTEGER NOT NULL) "
    "WITHOUT ROWID"
)
"""What answers were asked for: of use to counts alone, so that a run that was killed counts as if it had not been."""
_AT_ONCE = 500
_EXTERNAL = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM,
}  # fmt: skip
"""Errors of the machine, and not of the file's content."""
_SUFFIXES = ("", "-wal", "-shm")


def answer_key(**told: Any) -> str:
    """The key of an answer: a digest of who is asked, what, and how."""
    return json_digest(told)


class AnswerStore:
    """A table of answers, shared by the runs of a machine; each call is a transaction of its own.

    Each answer has a digest. One that is not as it was written is left out and said, and the caller asks again. A file
    that SQLite cannot read is put aside as `<name>.damaged`, and a new one is begun.

    Args:
        path: of the file, which is made with its folder.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._named():
            make_folder(path.parent)
            self._prepare()

    def get(self, keys: Sequence[str]) -> dict[str, list[float]]:
        """The answers that are known."""
        answers: dict[str, list[float]] = {}
        damaged = 0
        for key, answer, digest in self._select("key, answer, sha256 FROM sealed_answers", keys):
            if digest == _digest(key, answer):
                answers[key] = json.loads(answer)
            else:
                damaged += 1
        if damaged:
            logger.warning("%d answers in %s are damaged, and are asked for again", damaged, self._path)
        return answers

    def work(self, keys: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Of the answers that were put with it: the work that they were asked for, and after how many attempts."""
        return {key: (work, attempts) for key, work, attempts in self._select("key, work, attempts FROM work", keys)}

    def put(
        self, answers: Mapping[str, Sequence[float]], *, work: Mapping[str, str] | None = None, attempts: int = 1
    ) -> None:
        """Keep answers.

        Args:
            work: by key, a name for what an answer was asked for.
            attempts: that each took, >= 1.
        """
        texts = {key: json.dumps(list(answer)) for key, answer in answers.items()}
        rows = [(key, text, _digest(key, text)) for key, text in texts.items()]
        asked = [(key, name, attempts) for key, name in (work or {}).items() if key in texts]
        with self._put_aside_if_damaged():
            self._write(rows, asked)
            return
        self._write(rows, asked)  # to the file that took the damaged one's place

    def _select(self, what: str, keys: Sequence[str]) -> list[tuple[Any, Any, Any]]:
        rows: list[tuple[Any, Any, Any]] = []
        for start in range(0, len(keys), _AT_ONCE):
            part = list(keys[start : start + _AT_ONCE])
            marks = ",".join("?" * len(part))
            with self._named(), self._put_aside_if_damaged(), closing(self._open()) as connection:
                rows += connection.execute(f"SELECT {what} WHERE key IN ({marks})", part).fetchall()
        return rows

    def _write(self, rows: Sequence[tuple[str, str, str]], asked: Sequence[tuple[str, str, int]]) -> None:
        with self._named(), closing(self._open()) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO sealed_answers VALUES (?, ?, ?)", rows)
            connection.executemany("INSERT OR REPLACE INTO work VALUES (?, ?, ?)", asked)

    def _named(self) -> AbstractContextManager[None]:
        """Name what stops the file from being read or written."""
        return writing(self._path, "the judges' answers")

    def _prepare(self) -> None:
        with self._put_aside_if_damaged(prepare=False):
            self._create()
            return
        self._create()

    def _create(self) -> None:
        with closing(self._open()) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
            with connection:
                connection.execute(_SCHEMA)
                connection.execute(_WORK_SCHEMA)
                _seal_earlier_answers(connection)

    def _open(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=60.0)

    @contextlib.contextmanager
    def _put_aside_if_damaged(self, *, prepare: bool = True) -> Iterator[None]:
        """Begin a new file where SQLite finds that this one is damaged; the caller goes on behind the `with`."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            if not self._is_damage(error):
                raise
            aside = self._path.with_name(f"{self._path.name}.damaged")
            logger.warning(
                "the judges' answers in %s are damaged (%s): the file is kept as %s, a new one is begun, and what it "
                "held is asked for again", self._path, error, aside.name,
            )  # fmt: skip
            for suffix in _SUFFIXES:
                with contextlib.suppress(FileNotFoundError):
                    os.replace(f"{self._path}{suffix}", f"{aside}{suffix}")
            if prepare:
                self._create()

    def _is_damage(self, error: sqlite3.DatabaseError) -> bool:
        if isinstance(error, sqlite3.ProgrammingError):
            return False
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # none where text is no UTF-8
        if code == sqlite3.SQLITE_READONLY:  # also said of a file whose header asks for a later SQLite
            return os.access(self._path, os.W_OK)
        return code not in _EXTERNAL


def _digest(key: Any, answer: Any) -> str:
    return json_digest([str(key), str(answer)])[:32]


def _seal_earlier_answers(connection: sqlite3.Connection) -> None:
    """Give digests to the answers of earlier versions, which had none; once."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
        return
    rows = connection.execute("SELECT key, answer FROM answers").fetchall()
    sealed = [(key, answer, _digest(key, answer)) for key, answer in rows]
    connection.executemany("INSERT OR IGNORE INTO sealed_answers VALUES (?, ?, ?)", sealed)
    connection.execute("DROP TABLE answers")
