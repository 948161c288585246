"""What a run has made, as names and values that two runs are compared by, and what is left out of that."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

UNREAD = (
    "starts.jsonl", "ends.jsonl", ".lock", "curves.png", "manifest.json", "alignlab-manifest.json", "README.md",
    "_SHA256SUMS-rank0", "_SHA256SUMS-rank1",
)  # fmt: skip
"""Files that tell of a start, or are drawn for people; digests are those of files with times in them."""
_PLACE = ("line", "sha256")
JOURNAL = re.compile(r"rank\d+\.jsonl")
_COMPARED_ELSEWHERE = ("sha256", "evaluation_due")
"""The digest is the content's. A checkpoint that a failing run kept says truly that an evaluation is due, where that of
an uninterrupted run is written after it; whether it came is seen in the metrics."""
_SHOWN = 60
LEFT_OVER = "is left over"
TIMED = re.compile(r"(^time|_s|_seconds|^run|^staleness|policy_version)$")
"""Fields that hold times and the random name of a run, or follow times: which version of the policy sampled a token,
where that is done meanwhile."""


def what_was_made(run: Path, root: Path) -> dict[str, str]:
    """Everything in a run's folder by name: tensors, lines of metrics, rows of rollouts, texts; times left out.

    Raises:
        whatever reading a damaged file raises.
    """
    found: dict[str, str] = {}
    for path in sorted(run.rglob("*")):
        if path.is_dir() or path.name in UNREAD or "trackers" in path.parts:
            continue
        for name, value in _values(path):
            key = os.path.normpath(f"{path.relative_to(run)}{name}")
            found[key] = value.replace(str(root), "ROOT")
    for folder in sorted(run.rglob("rollouts")):
        found |= _rollouts(folder, str(folder.relative_to(run)))
    return found


def differences(made: Mapping[str, str], expected: Mapping[str, str]) -> list[str]:
    """One sentence for each name of which the value is another, missing or not expected."""
    told = []
    for name in sorted({*made, *expected}):
        if name not in made:
            told.append(f"{name} is missing")
        elif name not in expected:
            told.append(f"{name} {LEFT_OVER}")
        elif made[name] != expected[name]:
            told.append(f"{name} is {how_they_differ(made[name], expected[name])}")
    return told


def how_they_differ(value: str, expected: str) -> str:
    """The first place where two texts part, of each with what is before and behind it."""
    place = next((i for i, (a, b) in enumerate(zip(value, expected, strict=False)) if a != b), 0)
    part = slice(max(place - _SHOWN, 0), place + _SHOWN)
    return f"... {value[part]} ... and not ... {expected[part]} ..."


def _values(path: Path) -> Iterator[tuple[str, str]]:
    if path.suffix == ".safetensors":
        yield from _tensors(path)
    elif path.name == "metrics.jsonl":
        from alignlab.runs.metrics_file import read_metrics

        yield from ((f":{i}", untimed(line)) for i, line in enumerate(read_metrics(path)))
    elif path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        if JOURNAL.match(path.name):
            # Ranks hold the rows of other prompts where a run goes on: all rows are compared, wherever they stand.
            yield from ((f"/../rank*:{row['index']}", untimed(row, *_PLACE)) for row in rows)
        else:
            yield from ((f":{i}", untimed(row)) for i, row in enumerate(rows))
    elif path.suffix == ".json":
        yield "", untimed(json.loads(path.read_text()), *_COMPARED_ELSEWHERE)
    elif path.suffix == ".parquet":
        yield "", "its rows stand under the folder"
    else:
        yield "", hashlib.sha256(path.read_bytes()).hexdigest()


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        names = sorted(file.keys())
        for name in names:
            part = file.get_slice(name)
            yield f":{name}", f"{part.get_dtype()} {part.get_shape()}"
    yield "", hashlib.sha256(path.read_bytes()).hexdigest()


def _rollouts(folder: Path, name: str) -> dict[str, str]:
    from alignlab.runs.rollout_store import read_rollouts

    rows = read_rollouts(folder).to_pylist()
    return {f"{name}:{i}": untimed(row) for i, row in enumerate(rows)}


def untimed(value: Any, *others: str) -> str:
    """A value as JSON, its times and what has these other names left out."""
    left = _without_times(value)
    kept = {name: entry for name, entry in left.items() if name not in others} if others else left
    return json.dumps(kept, sort_keys=True, default=str)


def _without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        # A file's digest follows the times in it.
        value = {key: entry for key, entry in value.items() if not (isinstance(entry, Mapping) and "sha256" in entry)}
        return {key: _without_times(entry) for key, entry in value.items() if not TIMED.search(str(key))}
    if isinstance(value, list):
        return [_without_times(entry) for entry in value]
    return value
