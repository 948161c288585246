"""Judges' answers on disk, by a digest of all that they depend on; a damaged answer is dropped and asked for again."""

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

from alignlab.errors import ConfigError
from alignlab.files.atomic_files import make_folder
from alignlab.files.digests import json_digest
from alignlab.files.library_errors import writing

logger = logging.getLogger(__name__)
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS sealed_answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL, sha256 TEXT NOT NULL) "
    "WITHOUT ROWID"
)
_WORK_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS work (key TEXT PRIMARY KEY, work TEXT NOT NULL, attempts INTEGER NOT NULL) "
    "WITHOUT ROWID"
)
"""By answer, the work that it was asked for, so that a killed and resumed run counts the same questions."""
_KEYS_A_QUERY = 500
_MACHINE_ERRORS = {
    sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PERM,
}  # fmt: skip
"""Errors of the machine rather than of the file's content."""
_SUFFIXES = ("", "-wal", "-shm")


def answer_key(**facts: Any) -> str:
    """Return the key of an answer: a digest of the model, the question and how it is asked."""
    return json_digest(facts)


class AnswerStore:
    """A table of answers, shared by the runs of a machine; each call is a separate transaction.

    Each answer has a digest. An answer that does not match its digest is left out with a warning, and the caller asks
    again. A file that SQLite cannot read is renamed to `<name>.damaged`, and a new one is begun.

    Args:
        path: the file; created with its folder if absent.

    Raises:
        ConfigError: a folder, a pipe or a link that leads to nothing has the file's name.
        DiskError: the file cannot be opened or written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        if os.path.lexists(path) and not path.is_file():
            raise ConfigError(
                f"{path} must be the file of the judges' answers, and is a folder, a pipe or a link that leads to "
                "nothing; remove it, or name another folder by ALIGNLAB_CACHE"
            )
        with self._naming_errors():
            make_folder(path.parent)
            self._prepare()

    def get(self, keys: Sequence[str]) -> dict[str, list[float]]:
        """Return the stored answers among some keys."""
        answers: dict[str, list[float]] = {}
        num_damaged = 0
        for key, answer, digest in self._select("key, answer, sha256 FROM sealed_answers", keys):
            if digest == _digest(key, answer):
                answers[key] = json.loads(answer)
            else:
                num_damaged += 1
        if num_damaged:
            logger.warning("%d answers in %s are damaged, and are asked for again", num_damaged, self._path)
        return answers

    def work(self, keys: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Return, by key, the work that an answer was asked for and its number of attempts, as far as stored."""
        return {key: (work, attempts) for key, work, attempts in self._select("key, work, attempts FROM work", keys)}

    def put(
        self, answers: Mapping[str, Sequence[float]], *, work: Mapping[str, str] | None = None, attempts: int = 1
    ) -> None:
        """Store answers.

        Args:
            answers: by key, the probabilities of the choices.
            work: by key, the name of the work that an answer was asked for.
            attempts: number of attempts that each answer took, >= 1.
        """
        texts = {key: json.dumps(list(answer)) for key, answer in answers.items()}
        rows = [(key, text, _digest(key, text)) for key, text in texts.items()]
        work_rows = [(key, name, attempts) for key, name in (work or {}).items() if key in texts]
        with self._put_aside_if_damaged():
            self._write(rows, work_rows)
            return
        self._write(rows, work_rows)  # into the new file, in place of the damaged one

    def _select(self, columns: str, keys: Sequence[str]) -> list[tuple[Any, Any, Any]]:
        rows: list[tuple[Any, Any, Any]] = []
        for start in range(0, len(keys), _KEYS_A_QUERY):
            some_keys = list(keys[start : start + _KEYS_A_QUERY])
            marks = ",".join("?" * len(some_keys))
            with self._naming_errors(), self._put_aside_if_damaged(), closing(self._open()) as connection:
                rows += connection.execute(f"SELECT {columns} WHERE key IN ({marks})", some_keys).fetchall()
        return rows

    def _write(self, rows: Sequence[tuple[str, str, str]], work_rows: Sequence[tuple[str, str, int]]) -> None:
        with self._naming_errors(), closing(self._open()) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO sealed_answers VALUES (?, ?, ?)", rows)
            connection.executemany("INSERT OR REPLACE INTO work VALUES (?, ?, ?)", work_rows)

    def _naming_errors(self) -> AbstractContextManager[None]:
        """Raise errors of the machine, such as a full disk, as named errors."""
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
        """Begin a new file if SQLite finds this one damaged; the code after the `with` block then uses the new one."""
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
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF  # absent where text is not UTF-8
        if code == sqlite3.SQLITE_READONLY:  # SQLite says so, too, if the file's header asks for a later version
            return os.access(self._path, os.W_OK) and os.access(self._path.parent, os.W_OK)
        return code not in _MACHINE_ERRORS


def _digest(key: Any, answer: Any) -> str:
    return json_digest([str(key), str(answer)])[:32]


def _seal_earlier_answers(connection: sqlite3.Connection) -> None:
    """Move the answers of earlier versions, which had no digests, to the table of answers with digests."""
    if not connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'answers'").fetchone():
        return
    rows = connection.execute("SELECT key, answer FROM answers").fetchall()
    sealed = [(key, answer, _digest(key, answer)) for key, answer in rows]
    connection.executemany("INSERT OR IGNORE INTO sealed_answers VALUES (?, ?, ?)", sealed)
    connection.execute("DROP TABLE answers")
