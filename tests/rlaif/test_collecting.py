"""Work that is kept as it is done: after a stop, a torn line, or another number of ranks, nothing is done twice."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import CheckpointError, DataError
from alignlab.rlaif.collecting import check_made_with, collect, finished
from alignlab.training.journal import write_rows
from alignlab.types import Prompt


class Ranks:
    """Of accelerate's Accelerator, what `collect` reads."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.process_index, self.num_processes = rank, ranks

    def wait_for_everyone(self) -> None:
        pass


PROMPTS = [Prompt((1,), "p", index=i) for i in (5, 3, 8, 1, 7)]


def run(
    folder: Path, done: list[int], *, ranks: Any = None, stop_at: int | None = None, fail_at: int | None = None,
    late_at: int | None = None, prompts: Any = PROMPTS,
) -> Any:
    def work(batch: Sequence[Prompt]) -> list[dict[str, Any]]:
        indices = [prompt.index for prompt in batch]
        if fail_at in indices:
            raise RuntimeError("lost")
        if stop_at in indices:
            os.kill(os.getpid(), signal.SIGINT)
        done.extend(indices)
        rows = [{"index": i, "prompt": "p", "value": 10 * i, "outcome": "done"} for i in indices]
        return [row | {"outcome": "timeout"} if row["index"] == late_at else row for row in rows]

    return collect(prompts, work, folder, batch_size=2, accelerator=ranks or Ranks(), title="test")


def test_rows_come_in_the_order_of_the_prompts_and_once(tmp_path: Path) -> None:
    done: list[int] = []
    rows = run(tmp_path, done)
    assert [row["value"] for row in rows] == [50, 30, 80, 10, 70] and done == [5, 3, 8, 1, 7]
    assert run(tmp_path, done) == rows and len(done) == 5


def test_a_signal_ends_it_after_the_batch_and_the_rest_is_done_later(tmp_path: Path) -> None:
    done: list[int] = []
    assert run(tmp_path, done, stop_at=3) is None and done == [5, 3]
    rows = run(tmp_path, done)
    assert done == [5, 3, 8, 1, 7] and len(rows) == 5


def test_what_was_done_before_a_failure_is_kept(tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(RuntimeError, match="lost"):
        run(tmp_path, done, fail_at=8)
    assert len(run(tmp_path, done)) == 5 and done == [5, 3, 8, 1, 7]


def test_an_answer_that_another_rank_got_later_counts(tmp_path: Path) -> None:
    """Rank 1 got none; rank 0, whose rows are read first, asks again."""
    assert run(tmp_path, [], ranks=Ranks(1, 2), late_at=3) is None
    done: list[int] = []
    rows = run(tmp_path, done)
    assert done == [5, 3, 8, 7] and {row["outcome"] for row in rows} == {"done"}
    assert run(tmp_path, done) == rows and len(done) == 4


def test_ranks_share_the_work_and_a_later_start_may_have_fewer(tmp_path: Path) -> None:
    done: list[int] = []
    assert run(tmp_path, done, ranks=Ranks(1, 2)) is None and done == [3, 1]
    assert [row["index"] for row in run(tmp_path, done)] == [5, 3, 8, 1, 7] and done == [3, 1, 5, 8, 7]


def test_what_got_no_answer_is_asked_again(tmp_path: Path) -> None:
    done: list[int] = []
    assert [row["outcome"] for row in run(tmp_path, done, late_at=8)] == ["done", "done", "timeout", "done", "done"]
    assert [row["outcome"] for row in run(tmp_path, done)] == ["done"] * 5 and done == [5, 3, 8, 1, 7, 8]
    assert [row["outcome"] for row in finished(PROMPTS, tmp_path, done=tmp_path)] == ["done"] * 5


def test_prompts_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two prompts have the same index"):
        run(tmp_path, [], prompts=[Prompt((1,), text) for text in "ab"])
    run(tmp_path, [], stop_at=3)
    with pytest.raises(CheckpointError, match="holds a row of another prompt 3"):
        run(tmp_path, [], prompts=[Prompt((1,), "q", index=3)])


def test_rows_are_written_whole(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"a": 1}, {"a": "é\n"}])
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == [{"a": 1}, {"a": "é\n"}]


def damage_line(path: Path, number: int) -> None:
    lines = path.read_text().splitlines(keepends=True)
    lines[number] = lines[number].replace('"value": ', '"value": 1')
    path.write_text("".join(lines))


def test_damaged_rows_are_made_again_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    rows = run(tmp_path, done)
    damage_line(tmp_path / "rank0.jsonl", 2)
    assert run(tmp_path, done) == rows and done == [5, 3, 8, 1, 7, 8]
    assert "rank0.jsonl: line 3 is damaged" in caplog.text and "what is lost is made again" in caplog.text
    caplog.clear()
    assert run(tmp_path, done) == rows and len(done) == 6 and not caplog.records


@pytest.mark.parametrize("damage", ["changed", "last removed", "complete"])
def test_damaged_rows_that_were_learnt_from_are_refused(tmp_path: Path, damage: str) -> None:
    done, over = [], tmp_path / "preferences.jsonl"
    rows = run(tmp_path, done)
    assert finished(PROMPTS, tmp_path, done=over) == rows
    journal = tmp_path / "rank0.jsonl"
    if damage == "changed":
        damage_line(journal, 2)
    elif damage == "complete":
        file = tmp_path / "complete.json"
        file.write_text(file.read_text().replace("rows", "rowz"))
    else:
        journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:-1]))
    message = "complete.json is damaged" if damage == "complete" else r"learnt from.*restore.*or remove .*preferences"
    with pytest.raises(CheckpointError, match=message):
        finished(PROMPTS, tmp_path, done=over)
    (tmp_path / "complete.json").unlink() if damage == "complete" else None
    assert run(tmp_path, done) == rows
    assert finished(PROMPTS, tmp_path, done=over) == rows


def test_what_rows_were_made_with_is_told_apart_from_damage(tmp_path: Path) -> None:
    told = {"judge": {"name": "a"}, "seed": 1}
    check_made_with(tmp_path, told, writes=True)
    check_made_with(tmp_path, told, writes=True)
    with pytest.raises(CheckpointError, match="made with another judge"):
        check_made_with(tmp_path, told | {"judge": {"name": "b"}}, writes=True)
    file = tmp_path / "made_with.json"
    content = file.read_bytes()
    draw = random.Random(0)
    for position in draw.sample(range(len(content)), 40):
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        try:
            check_made_with(tmp_path, told, writes=True)  # as where a space became another white space
        except CheckpointError as error:
            assert "made_with.json is damaged" in str(error)
