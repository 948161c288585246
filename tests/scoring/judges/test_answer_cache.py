"""Judges' answers on disk: a damaged one is asked for again, and none is ever another."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from alignlab.errors import ConfigError
from alignlab.scoring.judges.answer_cache import AnswerStore, answer_key

ANSWERS = {answer_key(model="m", conversation=[f"question {i}"]): [i / 50, 1 - i / 50] for i in range(50)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    AnswerStore(tmp_path / "answers.sqlite").put(ANSWERS)
    return tmp_path / "answers.sqlite"


def test_stored_answers_are_returned(path: Path) -> None:
    assert AnswerStore(path).get(list(ANSWERS)) == ANSWERS
    assert AnswerStore(path).get(["unknown"]) == {}


def test_no_flipped_bit_gives_another_answer(path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = path.read_bytes()
    draw = random.Random(0)
    places = [*range(0, 100, 5), *draw.sample(range(100, len(content)), 50)]  # the first 100 bytes are the header
    for number, position in enumerate(places):
        caplog.clear()
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "answers.sqlite").write_bytes(flipped)
        store = AnswerStore(folder / "answers.sqlite")
        found = store.get(list(ANSWERS))
        assert found.items() <= ANSWERS.items(), position
        store.put({key: ANSWERS[key] for key in ANSWERS if key not in found})
        assert store.get(list(ANSWERS)) == ANSWERS, position
        shutil.rmtree(folder)


def test_a_changed_answer_is_dropped_with_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    key = next(iter(ANSWERS))
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE sealed_answers SET answer = '[0.5, 0.5]' WHERE key = ?", [key])
    store = AnswerStore(path)
    assert store.get(list(ANSWERS)) == {k: answer for k, answer in ANSWERS.items() if k != key}
    assert "1 answers in" in caplog.text and "are asked for again" in caplog.text


def test_a_file_that_sqlite_cannot_read_is_put_aside(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.write_bytes(b"nonsense" * 1000)
    store = AnswerStore(path)
    assert store.get(list(ANSWERS)) == {} and "a new one is begun" in caplog.text
    store.put(ANSWERS)
    assert store.get(list(ANSWERS)) == ANSWERS
    assert path.with_name("answers.sqlite.damaged").read_bytes() == b"nonsense" * 1000


def test_a_file_damaged_while_the_store_is_open_is_put_aside(path: Path) -> None:
    store = AnswerStore(path)
    path.write_bytes(b"nonsense" * 1000)
    assert store.get(list(ANSWERS)) == {}
    path.write_bytes(b"nonsense" * 1000)
    store.put(ANSWERS)
    assert store.get(list(ANSWERS)) == ANSWERS


def test_answers_of_an_earlier_version_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.sqlite"
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("CREATE TABLE answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")
        connection.execute("INSERT INTO answers VALUES ('a', '[0.25, 0.75]')")
    assert AnswerStore(path).get(["a"]) == {"a": [0.25, 0.75]}
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall() == [
            ("sealed_answers",), ("work",),
        ]


def test_errors_of_the_machine_leave_the_file_in_place(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = AnswerStore(path)

    def full(*_: object) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    monkeypatch.setattr(store, "_write", full)
    with pytest.raises(sqlite3.OperationalError, match="disk is full"):
        store.put(ANSWERS)
    assert not path.with_name("answers.sqlite.damaged").exists()


def test_a_folder_that_may_not_be_written_is_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite calls the table read-only: it cannot put its log beside it."""
    def may(place: Path, mode: int) -> bool:
        return Path(place) != path.parent

    monkeypatch.setattr("alignlab.scoring.judges.answer_cache.os.access", may)
    error = sqlite3.OperationalError("attempt to write a readonly database")
    error.sqlite_errorcode = sqlite3.SQLITE_READONLY
    assert not AnswerStore(path)._is_damage(error)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_named_before_it_is_opened(tmp_path: Path, make: Callable[[Path], object]) -> None:
    path = tmp_path / "answers.sqlite"
    make(path)
    with pytest.raises(ConfigError, match="must be the file of the judges' answers"):
        AnswerStore(path)
