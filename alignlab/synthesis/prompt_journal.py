"""Rows that a model or a judge makes of prompts, one each, kept batch by batch so that a stopped run goes on.

<folder>/
    made_with.json   what the rows depend on, such as the model and the judge
    rank<r>.jsonl    a journal of the rows that rank r has made, each with the digest of what it was made with
    complete.json    digest of all rows, written once every prompt has one
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from alignlab.errors import CheckpointError, DataError
from alignlab.files.atomic_files import make_folder, write_atomically
from alignlab.files.digests import DamagedError, json_digest, parse_sealed, sealed
from alignlab.runs.interrupt import catch_interrupts
from alignlab.runs.journal import Journal, read_journal
from alignlab.runs.progress import TrainingProgress
from alignlab.scoring.judges.chat_model import DOWN
from alignlab.types import Prompt, Text

logger = logging.getLogger(__name__)
_MADE_WITH = "made_with"
_REQUIRED = {"index", "prompt", "outcome"}
Row = dict[str, Any]
MakeRows = Callable[[Sequence[Prompt]], Sequence[Mapping[str, Any]]]


class PromptJournal:
    """The rows of one stage of a run.

    Args:
        folder: the folder of the journals; made by `check_made_with`.
        accelerator: the ranks, each of which makes a share of the rows.
    """

    def __init__(self, folder: Path, accelerator: Accelerator) -> None:
        self.folder = folder
        self._accelerator = accelerator
        self._rank, self._num_ranks = accelerator.process_index, accelerator.num_processes
        self._made_with: str | None = None

    def check_made_with(self, facts: Mapping[str, Any]) -> None:
        """Raise if earlier rows depend on other facts; where there are none yet, the main rank records the facts.

        Args:
            facts: what the rows depend on, as JSON.

        Raises:
            CheckpointError: earlier rows were made with another model, judge, constitution or sampling.
        """
        self._made_with = json_digest(facts)
        path = self.folder / "made_with.json"
        if not path.exists():
            make_folder(self.folder)
            if self._rank == 0:
                write_atomically(path, json.dumps(sealed(facts), indent=1) + "\n")
            return
        try:
            recorded = parse_sealed(path.read_text(encoding="utf-8", errors="replace"))
        except DamagedError as error:
            raise CheckpointError(
                f"{path} is damaged ({error}) or of an earlier version, and says what the rows beside it were made "
                "with; remove it if nothing of the run's settings has changed since, or use another output_dir"
            ) from error
        changed = [name for name, value in facts.items() if recorded.get(name) != value]
        if changed:
            raise CheckpointError(
                f"{self.folder} holds rows that were made with another {' and '.join(changed)}, see {path.name}; go on "
                "with what the run was started with, or use another output_dir"
            )

    def collect(
        self, prompts: Sequence[Prompt], make_rows: MakeRows, *, batch_size: int, title: str
    ) -> list[Row] | None:
        """Return one row for each prompt, in the order of the prompts; make those that are missing.

        Every rank calls this together. Rows of an earlier start, on however many ranks, are not made again, except
        those that got no answer and those whose line is damaged. SIGINT or SIGTERM stops the work after a batch.

        Args:
            prompts: with distinct `index`.
            make_rows: makes one row a prompt, with the keys `index`, `prompt` and `outcome`.
            batch_size: prompts whose rows are made, and written to the disk, together.
            title: name of the work in the progress display.

        Returns:
            The rows; None where a signal came, on any rank, also during the last batch: the rows so far are stored.

        Raises:
            DataError: two prompts have the same index.
            CheckpointError: earlier rows are of other prompts.
        """
        rows, damage = self._read()
        if self._rank == 0 and damage:
            logger.warning("%s; what is lost is made again", "; ".join(damage))
        latest = _latest(rows)
        self._check_same_prompts(prompts, latest)
        self._accelerator.wait_for_everyone()  # before any rank writes, so that all read the same rows
        missing = [prompt for prompt in prompts if not _has_answer(latest.get(prompt.index))]
        share = missing[self._rank :: self._num_ranks]
        stopped = self._any_rank(self._make(share, make_rows, batch_size, title))
        latest = _latest(self._read()[0])
        is_complete = all(prompt.index in latest for prompt in prompts)
        if is_complete and self._rank == 0:
            write_atomically(self._digest_file, json.dumps(sealed({"rows": _digest(latest)})) + "\n")
        return [latest[prompt.index] for prompt in prompts] if is_complete and not stopped else None

    def read_complete(self, prompts: Sequence[Prompt], *, done: Path) -> list[Row]:
        """Return the rows of a stage that has ended; later stages have learnt from these rows.

        Args:
            prompts: as given to `collect`.
            done: the file that marks the stage as ended, for the message.

        Raises:
            CheckpointError: rows are damaged or of other prompts, or there are more prompts now.
        """
        rows, damage = self._read()
        remedy = (
            "these rows were learnt from, and are not made again by themselves: restore the file from a copy, or "
            f"remove {done}, by which what is lost is made again, and the folders of later stages"
        )
        if damage:
            raise CheckpointError(f"{'; '.join(damage)}; {remedy}")
        latest = _latest(rows)
        self._check_digest(latest, remedy)
        self._check_same_prompts(prompts, latest)
        missing = [prompt.index for prompt in prompts if prompt.index not in latest]
        if missing:
            raise CheckpointError(
                f"the stage in {self.folder} is over, with rows of {len(latest)} prompts, and is to have "
                f"{len(prompts)} now (prompt {missing[0]} has none); go on with the num_prompts that it had, or remove "
                f"{done}, by which the missing rows are made, and the folders of later stages"
            )
        return [latest[prompt.index] for prompt in prompts]

    def rows_of_this_rank(self) -> list[Row]:
        """Return all rows that this rank has written, those among them that were made again later."""
        return read_journal(self._journal_file).rows

    @property
    def _journal_file(self) -> Path:
        return self.folder / f"rank{self._rank}.jsonl"

    @property
    def _digest_file(self) -> Path:
        return self.folder / "complete.json"

    def _make(self, prompts: Sequence[Prompt], make_rows: MakeRows, batch_size: int, title: str) -> bool:
        """Make this rank's share of rows; return True where a signal came, also during the last batch."""
        journal = Journal(self._journal_file)
        starts = range(0, len(prompts), batch_size)
        progress = TrainingProgress(len(starts), title=title, enabled=self._rank == 0)
        with catch_interrupts() as interrupt, progress:
            for number, start in enumerate(starts, start=1):
                rows = make_rows(prompts[start : start + batch_size])
                journal.append([{**row, _MADE_WITH: self._made_with} for row in rows])
                progress.step(number, {})
                if interrupt.requested:
                    progress.note(f"stopped by {interrupt.signal}; what is done is kept, go on with --resume")
                    break
        return interrupt.requested

    def _any_rank(self, flag: bool) -> bool:
        """Return True if the flag of any rank is True, once every rank has called this."""
        num_set: Any = self._accelerator.reduce(torch.tensor(float(flag), device=self._accelerator.device))
        return bool(num_set > 0)

    def _read(self) -> tuple[list[Row], list[str]]:
        """Return the intact rows of all journals, and a sentence for each place that is damaged."""
        rows: list[Row] = []
        damage: list[str] = []
        for path in sorted(self.folder.glob("rank*.jsonl")):
            content = read_journal(path)
            damage += [f"{path}: {sentence}" for sentence in content.damage]
            complete = [row for row in content.rows if row.keys() >= _REQUIRED]
            if len(complete) < len(content.rows):  # lines of an earlier version have no digest that shows damage
                damage.append(f"{path}: {len(content.rows) - len(complete)} lines are damaged")
            self._check_same_run(path, complete)
            rows += complete
        return rows, damage

    def _check_same_run(self, path: Path, rows: Sequence[Row]) -> None:
        """Raise if a journal is of another run: one that was copied here. Rows of earlier versions do not say."""
        if any(row.get(_MADE_WITH) not in (None, self._made_with) for row in rows):
            raise CheckpointError(
                f"{path} holds rows that were made with another model, judge or sampling than this run's; put the file "
                "back that was there, or remove it to have the rows made again"
            )

    def _check_same_prompts(self, prompts: Sequence[Prompt], rows: Mapping[int, Row]) -> None:
        if len({prompt.index for prompt in prompts}) < len(prompts):
            raise DataError("two prompts have the same index, by which rows are found; number them (Prompt.index)")
        for prompt in prompts:
            row = rows.get(prompt.index)
            if row is not None and row["prompt"] != prompt_json(prompt.text):
                raise CheckpointError(
                    f"{self.folder} holds a row of another prompt {prompt.index} ({str(row['prompt'])[:60]!r}); go on "
                    "with the data that the run was started with, or use another output_dir"
                )

    def _check_digest(self, rows: Mapping[int, Row], remedy: str) -> None:
        path = self._digest_file
        if not path.exists():  # a folder of an earlier version
            return
        try:
            is_same = parse_sealed(path.read_bytes())["rows"] == _digest(rows)
        except DamagedError as error:
            raise CheckpointError(f"{path} is damaged ({error}); remove it, if the rows beside it are whole") from error
        if not is_same:
            raise CheckpointError(f"the rows in {path.parent} are others than when the stage was over; {remedy}")


def prompt_json(text: Text) -> Any:
    """Return a prompt as the JSON of a row."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def _latest(rows: Sequence[Row]) -> dict[int, Row]:
    """Return the row of each prompt: the last one with an answer, or else the last one."""
    latest: dict[int, Row] = {}
    for row in rows:
        if _has_answer(row) or not _has_answer(latest.get(row["index"])):
            latest[row["index"]] = row
    return latest


def _has_answer(row: Mapping[str, Any] | None) -> bool:
    return row is not None and row["outcome"] not in ("unanswered", *DOWN)


def _digest(rows: Mapping[int, Row]) -> str:
    return json_digest([rows[index] for index in sorted(rows)])
