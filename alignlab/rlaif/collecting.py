"""Long work on prompts, kept batch by batch as it is done: each rank its share, in a journal of its own."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import nn

from alignlab.atomic_files import make_folder, write_atomically
from alignlab.config.constitution import Constitution
from alignlab.config.flat_settings import refused_settings
from alignlab.config.trainers.rlaif import LabelSettings, RevisionSettings, RLAIFConfig
from alignlab.digests import DamagedError, json_digest, parse_sealed, sealed
from alignlab.errors import CheckpointError, DataError
from alignlab.rlaif.chat_model import DOWN
from alignlab.training.interrupt import catch_interrupts
from alignlab.training.journal import Journal, read_journal
from alignlab.training.progress import TrainingProgress
from alignlab.training.reference_cache import digest_of_model
from alignlab.types import Prompt, Text

logger = logging.getLogger(__name__)
_MADE_WITH = "made_with.json"
_COMPLETE = "complete.json"
"""Digest of all rows, written when there is one for each prompt."""
_NEEDED = {"index", "prompt", "outcome"}
Work = Callable[[Sequence[Prompt]], Sequence[Mapping[str, Any]]]


def collect(
    prompts: Sequence[Prompt], work: Work, folder: Path, *, batch_size: int, accelerator: Accelerator, title: str
) -> list[dict[str, Any]] | None:
    """The rows that `work` makes of all prompts, in the order of the prompts; every rank calls it together.

    What an earlier start has done, on however many ranks, is not done again; but what it got no answer to is asked once
    more, and so is what its journals hold damaged. SIGINT or SIGTERM ends it after the batch.

    Args:
        work: makes one row of each prompt, with its `index`, its `prompt` and an `outcome`.
        folder: of the journals.

    Returns:
        One row a prompt; None where a signal came first.

    Raises:
        DataError: two prompts have one index.
        CheckpointError: earlier rows are of other prompts.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    rows, damage = _rows(folder)
    if rank == 0 and damage:
        logger.warning("%s; what is lost is made again", "; ".join(damage))
    known = _by_index(rows)
    _check_same(prompts, known, folder)
    accelerator.wait_for_everyone()  # nobody writes before all have read
    left = [prompt for prompt in prompts if not _is_done(known.get(prompt.index))][rank::ranks]
    journal = Journal(_journal(folder, rank))
    starts = range(0, len(left), batch_size)
    progress = TrainingProgress(len(starts), title=title, enabled=rank == 0)
    with catch_interrupts() as interrupt, progress:
        for number, start in enumerate(starts, start=1):
            journal.append(work(left[start : start + batch_size]))
            progress.step(number, {})
            if interrupt.requested:
                progress.note(f"stopped by {interrupt.signal}; what is done is kept, go on with --resume")
                break
    accelerator.wait_for_everyone()
    known = _by_index(_rows(folder)[0])
    if any(prompt.index not in known for prompt in prompts):
        return None
    if rank == 0:
        write_atomically(folder / _COMPLETE, json.dumps(sealed({"rows": _digest(known)})) + "\n")
    return [known[prompt.index] for prompt in prompts]


def made_with(
    config: RLAIFConfig, constitution: Constitution, model: nn.Module, settings: RevisionSettings | LabelSettings
) -> dict[str, Any]:
    """What the rows of a stage depend on, for `check_made_with`."""
    return {
        "constitution": constitution.model_dump(mode="json"),
        "model": digest_of_model(model),
        "judge": refused_settings(config.judge),
        "settings": refused_settings(settings),
        "seed": config.seed,
    }


def check_made_with(folder: Path, told: Mapping[str, Any], *, writes: bool) -> None:
    """Rows of two policies, judges, constitutions or samplings are not mixed by a resumed run.

    Args:
        folder: of the rows; `told` is kept there when there is none yet, by the rank that `writes`.
        told: what rows depend on, as JSON.

    Raises:
        CheckpointError: earlier rows were made with something else.
    """
    path = folder / _MADE_WITH
    if not path.exists():
        make_folder(folder)
        if writes:
            write_atomically(path, json.dumps(sealed(told), indent=1) + "\n")
        return
    before = _read_made_with(path)
    changed = [name for name, value in told.items() if before.get(name) != value]
    if changed:
        raise CheckpointError(
            f"{folder} holds rows that were made with another {' and '.join(changed)}, see {path.name}; go on with "
            "what the run was started with, or use another output_dir"
        )


def _read_made_with(path: Path) -> dict[str, Any]:
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        return parse_sealed(text)
    except DamagedError as error:
        raise CheckpointError(
            f"{path} is damaged ({error}) or of an earlier version, and says what the rows beside it were made with; "
            "remove it if nothing of the run's settings has changed since, or use another output_dir"
        ) from error



def finished(prompts: Sequence[Prompt], folder: Path, *, done: Path) -> list[dict[str, Any]]:
    """The rows of a stage that is over, as they are: later stages have learnt from them.

    Args:
        done: the file that says that the stage is over.

    Raises:
        CheckpointError: rows are damaged, or of other prompts.
    """
    found, damage = _rows(folder)
    remedy = (
        "these rows were learnt from, and are not made again by themselves: restore the file from a copy, or remove "
        f"{done}, by which what is lost is made again, and the folders of later stages"
    )
    if damage:
        raise CheckpointError(f"{'; '.join(damage)}; {remedy}")
    rows = _by_index(found)
    _check_complete(rows, folder / _COMPLETE, remedy)
    _check_same(prompts, rows, folder)
    return [rows[prompt.index] for prompt in prompts if prompt.index in rows]


def _check_complete(rows: Mapping[int, Mapping[str, Any]], path: Path, remedy: str) -> None:
    if not path.exists():
        return  # of an earlier version
    try:
        same = parse_sealed(path.read_bytes())["rows"] == _digest(rows)
    except DamagedError as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it, if the rows beside it are whole") from error
    if not same:
        raise CheckpointError(f"the rows in {path.parent} are others than when the stage was over; {remedy}")


def _digest(rows: Mapping[int, Mapping[str, Any]]) -> str:
    return json_digest([rows[index] for index in sorted(rows)])


def _by_index(rows: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The row of each prompt: the last one, but none without an answer where another rank has got one since."""
    known: dict[int, dict[str, Any]] = {}
    for row in rows:
        if _is_done(row) or not _is_done(known.get(row["index"])):
            known[row["index"]] = row
    return known


def rows_of_rank(folder: Path, rank: int) -> list[dict[str, Any]]:
    """All rows that a rank has kept, those among them that were made anew later."""
    return read_journal(_journal(folder, rank)).rows


def _journal(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.jsonl"


def _is_done(row: Mapping[str, Any] | None) -> bool:
    return row is not None and row["outcome"] not in ("unanswered", *DOWN)


def _check_same(prompts: Sequence[Prompt], rows: Mapping[int, Mapping[str, Any]], folder: Path) -> None:
    if len({prompt.index for prompt in prompts}) < len(prompts):
        raise DataError("two prompts have the same index, by which what is done is known; number them (Prompt.index)")
    for prompt in prompts:
        row = rows.get(prompt.index)
        if row is not None and row["prompt"] != as_json(prompt.text):
            raise CheckpointError(
                f"{folder} holds a row of another prompt {prompt.index} ({str(row['prompt'])[:60]!r}); go on with the "
                "data that the run was started with, or use another output_dir"
            )


def as_json(text: Text) -> Any:
    """A prompt as a row holds it."""
    return text if isinstance(text, str) else [dict(message) for message in text]


def _rows(folder: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The intact rows of all journals, and what is wrong with the others."""
    rows: list[dict[str, Any]] = []
    damage: list[str] = []
    for path in sorted(folder.glob("rank*.jsonl")):
        content = read_journal(path)
        damage += [f"{path}: {each}" for each in content.damage]
        whole = [row for row in content.rows if row.keys() >= _NEEDED]
        if len(whole) < len(content.rows):  # of an earlier version, whose lines had no digests
            damage.append(f"{path}: {len(content.rows) - len(whole)} lines are damaged")
        rows += whole
    return rows, damage
