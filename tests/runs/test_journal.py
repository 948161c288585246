"""Journals: what a crash, a flipped bit, a removed or a moved line leaves of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from alignlab.errors import DiskError
from alignlab.runs.journal import Journal, read_journal

ROWS = [{"index": i, "prompt": f"what is {i} + é?", "probability": 0.1 * i, "outcome": "judged"} for i in range(6)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    Journal(tmp_path / "rank0.jsonl").append(ROWS)
    return tmp_path / "rank0.jsonl"


def lines_of(path: Path) -> list[str]:
    return path.read_text().splitlines(keepends=True)


def test_an_incomplete_last_line_is_cut_off(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b'{"index": 6, "va')
    assert read_journal(path).damage == []
    journal = Journal(path)
    assert journal.rows == ROWS
    journal.append([{"index": 7}])
    assert [json.loads(line)["index"] for line in lines_of(path)] == [0, 1, 2, 3, 4, 5, 7]
    assert read_journal(path).rows == [*ROWS, {"index": 7}]


def test_every_flipped_bit_is_detected(path: Path) -> None:
    content = path.read_bytes()
    draw = random.Random(0)
    for position in [0, 9, len(content) - 1, *draw.sample(range(len(content)), 80)]:
        for bit in (0, draw.randrange(8)):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            found = read_journal(path)
            assert all(row in ROWS for row in found.rows), (position, bit)
            cut = position == len(content) - 1
            assert found.damage or found.rows == (ROWS[:-1] if cut else ROWS), (position, bit)


def test_removed_copied_or_moved_lines_are_detected(path: Path) -> None:
    lines = lines_of(path)
    changes = {
        "2 lines are missing before line 3": lines[:2] + lines[4:],
        "line 4 stands a second time": [*lines[:3], lines[0], *lines[3:]],
        "line 3 stands a second time, or out of its order": [lines[0], lines[2], lines[1], *lines[3:]],
    }
    for message, changed in changes.items():
        path.write_text("".join(changed))
        assert message in "; ".join(read_journal(path).damage)


def test_damaged_lines_are_set_aside_and_the_journal_continues(path: Path) -> None:
    lines = lines_of(path)
    damaged = "".join([*lines[:2], lines[2].replace("judged", "judgee"), *lines[3:]])
    path.write_text(damaged)
    content = read_journal(path)
    assert content.num_intact == 2 and content.rows == ROWS[:2] + ROWS[3:]
    assert content.damage == ["line 3 is damaged (its SHA-256 is not the one it was written with)"]
    journal = Journal(path)
    journal.append([ROWS[2]])
    assert path.with_name("rank0.jsonl.damaged").read_text() == damaged
    content = read_journal(path)
    assert content.rows == [*ROWS[:2], *ROWS[3:], ROWS[2]] and not content.damage


def test_a_file_of_an_earlier_version_is_read_and_gets_digests(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "nonsense\n")
    content = read_journal(path)
    assert content.rows == ROWS and not content.has_digests
    assert content.damage == ["line 7 is damaged (it is no JSON object)"]
    Journal(path).append([{"index": 6}])
    content = read_journal(path)
    assert content.rows == [*ROWS, {"index": 6}] and content.has_digests and not content.damage


def test_rows_after_a_damaged_one_are_dropped_where_their_order_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    Journal(path).append([{"part": i} for i in range(4)])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], lines[2].replace('"part": 2', '"part": 7'), lines[3]]))
    inode = path.stat().st_ino
    journal = Journal(path, in_order=True)
    assert [row["part"] for row in journal.rows] == [0, 1] and "line 3 is damaged" in journal.damage[0]
    assert path.read_text() == "".join(lines[:2]) and path.stat().st_ino == inode, "a lock on the file is kept"
    journal.append([{"part": 2}, {"part": 3}])
    assert path.read_text() == "".join(lines)


def test_a_folder_in_the_place_of_a_journal_is_named(tmp_path: Path) -> None:
    path = tmp_path / "folder.jsonl"
    path.mkdir()
    with pytest.raises(DiskError, match=r"the journal cannot be read .*the path is a folder, and must be a file"):
        read_journal(path)
