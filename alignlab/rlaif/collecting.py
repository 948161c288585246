"""Long work on prompts, kept batch by batch as it is done: each rank its share, in a journal of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from alignlab.rlaif.journal import Journal
from alignlab.training.interrupt import catch_interrupts
from alignlab.training.progress import TrainingProgress
from alignlab.types import Prompt

Work = Callable[[Sequence[Prompt]], Sequence[Mapping[str, Any]]]


def collect(
    prompts: Sequence[Prompt], work: Work, folder: Path, *, batch_size: int, accelerator: Accelerator, title: str
) -> list[dict[str, Any]] | None:
    """The rows that `work` makes of all prompts, in the order of the prompts; every rank calls it together.

    What an earlier start has done, on however many ranks, is not done again. SIGINT or SIGTERM ends it after the batch.

    Args:
        work: makes one row of each prompt, with its `index`.
        folder: of the journals.

    Returns:
        One row a prompt; None where a signal came first.
    """
    rank, ranks = accelerator.process_index, accelerator.num_processes
    done = {row["index"] for row in _rows(folder)}
    accelerator.wait_for_everyone()  # nobody writes before all have read
    left = [prompt for prompt in prompts if prompt.index not in done][rank::ranks]
    journal = Journal(folder / f"rank{rank}.jsonl")
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
    rows = {row["index"]: row for row in _rows(folder)}
    if any(prompt.index not in rows for prompt in prompts):
        return None
    return [rows[prompt.index] for prompt in prompts]


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(folder.glob("rank*.jsonl")) for row in Journal(path).rows]
