"""Records of a run: its starts and ends, a line of JSON each, and the last step that it saved.

Each record carries its own digest, and is on the disk before the run continues.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignlab.errors import ConfigError
from alignlab.files.atomic_files import write_atomically
from alignlab.files.digests import DamagedError, parse_sealed, sealed

logger = logging.getLogger(__name__)
PUT_BACK = "put the file back as it was, or choose another trainer.output_dir"


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file of records; a crash leaves the file with the line or without it."""
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomically(path, earlier + json.dumps(sealed(record)) + "\n")


def read_records(path: Path, *, fix: str = PUT_BACK) -> list[dict[str, Any]]:
    """Return the records in a file; none if there is no file.

    Args:
        fix: advice for a damaged file, in the message.

    Raises:
        ConfigError: a line is damaged.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(parse_sealed(line))
        except DamagedError as error:
            raise ConfigError(
                f"line {number} of {path} must be a record of a run, and is damaged ({error}); {fix}"
            ) from error
    return records


def run_id_of(starts: Path) -> str:
    """Return the id of the run whose starts are recorded in a file.

    Raises:
        ConfigError: the file names no run, or several.
    """
    ids = {record.get("run") for record in read_records(starts)}
    if len(ids) == 1 and isinstance(run_id := next(iter(ids)), str):
        return run_id
    problem = f"names {len(ids)} runs" if len(ids) > 1 else "names no run: an earlier version, or nobody, started it"
    raise ConfigError(
        f"{starts} must name the run that its folder holds, and {problem}; put the file back as it was, or choose "
        "another trainer.output_dir"
    )


def write_saved_step(path: Path, run_id: str | None, step: int) -> bool:
    """Record the step of the newest complete checkpoint, and return whether that was done.

    A failure is only logged: an earlier record is still true, it just names an older checkpoint.
    """
    try:
        write_atomically(path, json.dumps(sealed({"run": run_id, "step": step})) + "\n")
    except OSError as error:
        logger.warning("that step %d is saved could not be recorded: %s", step, error)
        return False
    return True


def read_saved_step(path: Path, run_id: str | None) -> int | None:
    """Return the recorded step of a run's newest checkpoint; None if there is no record.

    A record that is damaged or of another run counts as none, with a warning.
    """
    if not path.exists():
        return None
    try:
        record = parse_sealed(path.read_bytes())
        if record["run"] == run_id:
            return int(record["step"])
        problem = f"it is of the run {record['run']}"
    except DamagedError as error:
        problem = str(error)
    logger.warning(
        "%s must say which step was saved last, and does not (%s): a newer checkpoint that is gone would not be missed",
        path, problem,
    )  # fmt: skip
    return None
