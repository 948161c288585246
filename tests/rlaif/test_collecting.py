"""Work that is kept as it is done: after a stop, a torn line, or another number of ranks, nothing is done twice."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from alignlab.errors import CheckpointError, DataError
from alignlab.rlaif.collecting import collect, finished
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
