"""The records of a run's starts and ends: a line of JSON each, on the disk before the run goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignlab.atomic_files import write_atomically
from alignlab.errors import ConfigError


def append_record(path: Path, record: Mapping[str, Any]) -> None:
    """Add a line to a file of records; a crash leaves the file with the line or without it."""
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    write_atomically(path, earlier + json.dumps(record) + "\n")


def read_records(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of records; none where there is no file.

    Raises:
        ConfigError: a line is no record.
    """
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"line {number} of {path} must be a record of a run, and cannot be read ({error}); put the file back "
                "as it was, or choose another trainer.output_dir"
            ) from error
    return records


def run_id_of(starts: Path) -> str:
    """Return the id of the run whose starts a file records.

    Raises:
        ConfigError: it records none, or those of several runs.
    """
    ids = {record.get("run") for record in read_records(starts)}
    if len(ids) == 1 and isinstance(run_id := next(iter(ids)), str):
        return run_id
    problem = f"names {len(ids)} runs" if len(ids) > 1 else "names no run: an earlier version, or nobody, started it"
    raise ConfigError(
        f"{starts} must name the run that its folder holds, and {problem}; put the file back as it was, or choose "
        "another trainer.output_dir"
    )
