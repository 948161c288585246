"""What each rank contributes to a checkpoint where no rank holds all weights: a hidden folder, complete by its name.

    checkpoints/.step-00000020.part-1.tmp           being written
    checkpoints/.step-00000020.part-1.ready.tmp     complete, and synced to the disk

Rank 0 moves what is in them into the checkpoint. No rank sends another a message for that, so that those that are left
can save a step after one has failed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from alignlab.errors import CheckpointError
from alignlab.files.atomic_files import TEMPORARY, make_folder, remove, sync_file, sync_folder
from alignlab.files.library_errors import writing
from alignlab.models.pieces import Held
from alignlab.runs.tensor_groups import write_part

_POLL_S = 0.05


def write_rank_part(
    folder: Path, step: int, rank: int, tensors: Mapping[str, Mapping[str, Held]]
) -> None:
    """Write a rank's part of the checkpoint of a step; `tensors` by group, then by name.

    Args:
        folder: the folder of all checkpoints of the run.

    Raises:
        DiskError: it cannot be written.
    """
    place, ready = _places(folder, step, rank)
    with writing(folder, "a part of the checkpoint"):
        make_folder(folder)
        for earlier in (place, ready):
            remove(earlier)
        place.mkdir()
        for group, members in tensors.items():
            write_part(place, group, rank, members)
        sync_folder(place)
        os.replace(place, ready)
        sync_file(folder)


def ready_parts(folder: Path, step: int, num_ranks: int, *, wait_s: float) -> list[Path]:
    """Return the folders of all ranks' parts, waiting until they are complete.

    Raises:
        CheckpointError: a rank has written none within `wait_s` seconds.
    """
    places = [_places(folder, step, rank)[1] for rank in range(num_ranks)]
    until = time.monotonic() + wait_s
    while missing := [rank for rank, place in enumerate(places) if not place.exists()]:
        if time.monotonic() >= until:
            raise CheckpointError(
                f"rank {missing[0]} has not written its part of the checkpoint of step {step} within {wait_s:.0f} s; "
                "go on from the checkpoint before it by --resume"
            )
        time.sleep(_POLL_S)
    return places


def take_parts(parts: list[Path], checkpoint: Path) -> None:
    """Move the files of parts into the folder of a checkpoint."""
    for part in parts:
        for path in part.iterdir():
            os.replace(path, checkpoint / path.name)
        remove(part)


def _places(folder: Path, step: int, rank: int) -> tuple[Path, Path]:
    name = f".step-{step:08d}.part-{rank}"
    return folder / f"{name}.{TEMPORARY}", folder / f"{name}.ready.{TEMPORARY}"
