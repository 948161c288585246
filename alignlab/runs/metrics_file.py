"""The metrics file of a run: a line of JSON for each step. Checkpoints record its length and digest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignlab.errors import CheckpointError
from alignlab.files.atomic_files import write_atomically
from alignlab.files.digests import sha256_of
from alignlab.files.library_errors import writing

logger = logging.getLogger(__name__)


class MetricsFile:
    """A file to which lines are appended; its length and its digest are computed along the way.

    Args:
        path: the file; new, or cut to the steps that a resumed run has done.
        resume_step: drop the lines of later steps, and a line that a crash cut short. None begins a new file.
        last_step: last step of the run, whose evaluation is done again and therefore dropped.
        saved: the `state` in the checkpoint of `resume_step`; None: the lines cannot be verified.
        ended: the `state` when the run last ended; None if it left no record. Lines after those of `saved`, such as
            of a final evaluation, are kept only if the whole file is as it was then.

    Raises:
        CheckpointError: the lines that belong to the checkpoint were changed.
    """

    def __init__(
        self, path: Path, *, resume_step: int | None = None, last_step: int | None = None,
        saved: Mapping[str, Any] | None = None, ended: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = path
        lines = [] if resume_step is None else _lines_until(path, resume_step, last_step, saved, ended)
        content = b"".join(line + b"\n" for line in lines)
        self._unwritten: list[str] = []
        self._num_bytes, self._digest = len(content), hashlib.sha256(content)
        write_atomically(path, content)
        self._file = path.open("ab", buffering=0)  # a buffer would retry a failed write when it is closed

    def append(self, line: str) -> None:
        """Write a line. If that fails, no part of it stays in the file, and `state` returns it as unwritten.

        Raises:
            DiskError: the disk is full, or fails.
        """
        self._unwritten.append(line)
        content = f"{line}\n".encode()
        remaining = memoryview(content)
        try:
            with writing(self._path, "the metrics"):
                while remaining:
                    remaining = remaining[self._file.write(remaining) :]
        except OSError:
            with contextlib.suppress(OSError):
                self._file.truncate(self._num_bytes)
            raise
        self._unwritten.remove(line)
        self._num_bytes += len(content)
        self._digest.update(content)

    def state(self) -> dict[str, Any]:
        """Wait until all lines are on the disk, and return their length and digest, and lines that are not written.

        Raises:
            DiskError: the disk fails.
        """
        with writing(self._path, "the metrics"):
            os.fsync(self._file.fileno())
        return {"bytes": self._num_bytes, "sha256": self._digest.hexdigest(), "unwritten": list(self._unwritten)}

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file, in order, without a last line that is incomplete.

    Raises:
        CheckpointError: a line is damaged.
    """
    return [_parsed(path, number, line) for number, line in enumerate(_whole_lines(path.read_bytes()), start=1)]


def _whole_lines(content: bytes) -> list[bytes]:
    return [line for line in content[: content.rfind(b"\n") + 1].split(b"\n") if line]


def _parsed(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        metrics = json.loads(line)
        if isinstance(metrics, dict) and isinstance(metrics.get("step"), int):
            return metrics
        problem = "it has no step"
    except (ValueError, RecursionError) as error:
        problem = str(error)
    raise CheckpointError(
        f"line {number} of {path} must be the metrics of a step, and is damaged: {problem}; put the file back as it "
        "was, or rename it to go on without the metrics so far"
    )


def _lines_until(
    path: Path, step: int, last_step: int | None, saved: Mapping[str, Any] | None, ended: Mapping[str, Any] | None
) -> list[bytes]:
    """Return the lines that a run which resumes after `step` keeps; see `MetricsFile`."""
    if not path.exists():
        if saved is not None and saved["bytes"] > 0:
            logger.warning("%s is gone: the run goes on without the metrics of its first %d steps", path, step)
        return []

    def lines_to_keep(content: bytes) -> list[bytes]:
        return [line for line, metrics in _numbered(path, content) if _is_kept(metrics, step, last_step)]

    content = path.read_bytes()
    if saved is None:
        return lines_to_keep(content)
    length = saved["bytes"]
    if not _is_as_written(content[:length], saved):
        raise CheckpointError(
            f"the first {length} bytes of {path} must be as they were when the checkpoint of step {step} was saved, "
            "and were changed since, or are another run's; put the file back as it was, or rename it to go on without "
            f"the metrics of the first {step} steps"
        )
    lines = [*lines_to_keep(content[:length]), *(line.encode() for line in saved["unwritten"])]
    if ended is not None and _is_as_written(content, ended):
        lines += lines_to_keep(content[length:])
    return lines


def _numbered(path: Path, content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    lines = _whole_lines(content)
    return [(line, _parsed(path, number, line)) for number, line in enumerate(lines, start=1)]


def _is_as_written(content: bytes, state: Mapping[str, Any]) -> bool:
    return len(content) == state["bytes"] and sha256_of(content) == state["sha256"]


def _is_kept(metrics: Mapping[str, Any], step: int, last_step: int | None) -> bool:
    comes_again = metrics["step"] == last_step and any(name.startswith("eval/") for name in metrics)
    return bool(metrics["step"] <= step and not comes_again)
