"""Rows kept batch by batch: after a stop, a torn line, or with another number of ranks, no row is made twice."""

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
from alignlab.runs.journal import write_rows
from alignlab.synthesis.prompt_journal import PromptJournal
from alignlab.types import Prompt


class Ranks:
    """The parts of accelerate's Accelerator that a journal of prompts reads."""

    def __init__(self, rank: int = 0, ranks: int = 1) -> None:
        self.process_index, self.num_processes = rank, ranks
        self.device = "cpu"

    def wait_for_everyone(self) -> None:
        pass

    def reduce(self, value: Any) -> Any:
        return value


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

    return journal(folder, ranks).collect(prompts, work, batch_size=2, title="test")


def journal(folder: Path, ranks: Any = None) -> PromptJournal:
    return PromptJournal(folder, ranks or Ranks())


def test_rows_come_in_the_order_of_the_prompts_and_are_made_once(tmp_path: Path) -> None:
    done: list[int] = []
    rows = run(tmp_path, done)
    assert [row["value"] for row in rows] == [50, 30, 80, 10, 70] and done == [5, 3, 8, 1, 7]
    assert run(tmp_path, done) == rows and len(done) == 5


def test_a_signal_stops_the_work_after_a_batch_and_a_later_start_makes_the_other_rows(tmp_path: Path) -> None:
    done: list[int] = []
    assert run(tmp_path, done, stop_at=3) is None and done == [5, 3]
    rows = run(tmp_path, done)
    assert done == [5, 3, 8, 1, 7] and len(rows) == 5


def test_a_signal_in_the_last_batch_stops_the_work_too_and_no_row_is_made_again(tmp_path: Path) -> None:
    done: list[int] = []
    assert run(tmp_path, done, stop_at=7) is None and len(done) == 5
    rows = run(tmp_path, done)
    assert [row["value"] for row in rows] == [50, 30, 80, 10, 70] and len(done) == 5


def test_an_ended_stage_has_no_rows_of_more_prompts(tmp_path: Path) -> None:
    run(tmp_path, [])
    over = tmp_path / "rows.jsonl"
    more = [*PROMPTS, Prompt((1,), "p", index=9)]
    with pytest.raises(CheckpointError, match=r"is over, with rows of 5 prompts, and is to have 6 now \(prompt 9 has"):
        journal(tmp_path).read_complete(more, done=over)
    assert len(journal(tmp_path).read_complete(PROMPTS[:2], done=over)) == 2


def test_rows_made_before_a_failure_are_kept(tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(RuntimeError, match="lost"):
        run(tmp_path, done, fail_at=8)
    assert len(run(tmp_path, done)) == 5 and done == [5, 3, 8, 1, 7]


def test_a_later_answer_of_another_rank_replaces_a_row_without_answer(tmp_path: Path) -> None:
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


def test_a_prompt_without_an_answer_is_asked_again(tmp_path: Path) -> None:
    done: list[int] = []
    assert [row["outcome"] for row in run(tmp_path, done, late_at=8)] == ["done", "done", "timeout", "done", "done"]
    assert [row["outcome"] for row in run(tmp_path, done)] == ["done"] * 5 and done == [5, 3, 8, 1, 7, 8]
    assert [row["outcome"] for row in journal(tmp_path).read_complete(PROMPTS, done=tmp_path)] == ["done"] * 5


def test_prompts_need_distinct_numbers_and_stay_the_same(tmp_path: Path) -> None:
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


def test_damaged_rows_are_made_again_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    rows = run(tmp_path, done)
    damage_line(tmp_path / "rank0.jsonl", 2)
    assert run(tmp_path, done) == rows and done == [5, 3, 8, 1, 7, 8]
    assert "rank0.jsonl: line 3 is damaged" in caplog.text and "what is lost is made again" in caplog.text
    caplog.clear()
    assert run(tmp_path, done) == rows and len(done) == 6 and not caplog.records


@pytest.mark.parametrize("damage", ["changed", "last removed", "complete"])
def test_damaged_rows_of_an_ended_stage_are_refused(tmp_path: Path, damage: str) -> None:
    done, over = [], tmp_path / "preferences.jsonl"
    rows = run(tmp_path, done)
    assert journal(tmp_path).read_complete(PROMPTS, done=over) == rows
    file = tmp_path / "rank0.jsonl"
    if damage == "changed":
        damage_line(file, 2)
    elif damage == "complete":
        digest_file = tmp_path / "complete.json"
        digest_file.write_text(digest_file.read_text().replace("rows", "rowz"))
    else:
        file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    message = "complete.json is damaged" if damage == "complete" else r"learnt from.*restore.*or remove .*preferences"
    with pytest.raises(CheckpointError, match=message):
        journal(tmp_path).read_complete(PROMPTS, done=over)
    (tmp_path / "complete.json").unlink() if damage == "complete" else None
    assert run(tmp_path, done) == rows
    assert journal(tmp_path).read_complete(PROMPTS, done=over) == rows


def test_rows_of_another_run_s_journal_are_refused(tmp_path: Path) -> None:
    def rows(name: str, seed: int) -> Any:
        stage = journal(tmp_path / name)
        stage.check_made_with({"seed": seed})
        return stage.collect(PROMPTS, make, batch_size=2, title="test")

    def make(batch: Sequence[Prompt]) -> list[dict[str, Any]]:
        return [{"index": prompt.index, "prompt": "p", "outcome": "done"} for prompt in batch]

    rows("mine", 1)
    rows("other", 2)
    file = tmp_path / "mine" / "rank0.jsonl"
    file.write_bytes((tmp_path / "other" / "rank0.jsonl").read_bytes())
    with pytest.raises(CheckpointError, match=r"rank0\.jsonl holds rows that were made with another model, judge or"):
        rows("mine", 1)
    file.unlink()
    assert len(rows("mine", 1)) == len(PROMPTS)


def test_rows_made_with_other_facts_and_damaged_facts_are_refused(tmp_path: Path) -> None:
    facts = {"judge": {"name": "a"}, "seed": 1}
    journal(tmp_path).check_made_with(facts)
    journal(tmp_path).check_made_with(facts)
    with pytest.raises(CheckpointError, match="made with another judge"):
        journal(tmp_path).check_made_with(facts | {"judge": {"name": "b"}})
    file = tmp_path / "made_with.json"
    content = file.read_bytes()
    draw = random.Random(0)
    for position in draw.sample(range(len(content)), 40):
        flipped = bytearray(content)
        flipped[position] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        try:
            journal(tmp_path).check_made_with(facts)  # a changed space may be another white space
        except CheckpointError as error:
            assert "made_with.json is damaged" in str(error)
