"""Every rollout of a run in Parquet, a row for each completion, to be read with any tool at any time.

    import duckdb
    duckdb.sql("select step, avg(reward) from 'runs/alignlab/rollouts/*.parquet' group by step order by step")

Each rank writes one file a step, which is complete as soon as it has its name. The metadata of its schema name the
run, as `alignlab.run`. The SHA-256 of each file is in `_SHA256SUMS-rank<rank>` before the file has its name, so that a
changed file is noticed; `sha256sum -c` reads that list too. Readers of Parquet folders skip names that begin with an
underscore.

The columns: step, prompt_index (row of the dataset), sample_index (in its group), prompt, completion (texts), row (the
dataset's other columns, JSON), prompt_ids, token_ids, logprobs (of the distribution sampled from), raw_logprobs (of the
model's own distribution), reward, reward/<name> for each reward function, advantage, finish_reason, policy_version (of
the weights that sampled the first token), writers ("policy", "tool" or "user" for each token; null if the policy wrote
all of them).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq

from alignlab.errors import DataError
from alignlab.files.atomic_files import make_folder, replacing, write_atomically
from alignlab.files.digests import sha256_of_file
from alignlab.files.library_errors import writing
from alignlab.types import Rollout, message_text

logger = logging.getLogger(__name__)
PATTERN = "step-*.parquet"
SUMS = "_SHA256SUMS-rank"
RUN_KEY = b"alignlab.run"
COLUMNS = {
    "step": pa.int64(),
    "prompt_index": pa.int64(),
    "sample_index": pa.int64(),
    "prompt": pa.string(),
    "completion": pa.string(),
    "row": pa.string(),
    "prompt_ids": pa.list_(pa.int32()),
    "token_ids": pa.list_(pa.int32()),
    "logprobs": pa.list_(pa.float32()),
    "raw_logprobs": pa.list_(pa.float32()),
    "reward": pa.float64(),
    "advantage": pa.float64(),
    "finish_reason": pa.string(),
    "policy_version": pa.int64(),
    "writers": pa.list_(pa.string()),
}


class RolloutStore:
    """Writes the rollouts of one rank.

    Args:
        folder: folder of the files; created if absent.
        resume_step: remove the rollouts of later steps, which are sampled again. None begins with no rollouts.
        rank: rank of this process; it writes, and on resuming removes, only its own files.
        run_id: id of the run, see `RunFolder`; None for rollouts of no run.

    Raises:
        DataError: a file of an earlier step is of another run.
    """

    def __init__(
        self, folder: Path, *, resume_step: int | None = None, rank: int = 0, run_id: str | None = None
    ) -> None:
        self._folder, self._rank, self._run_id = folder, rank, run_id
        self._sums = folder / f"{SUMS}{rank}"
        make_folder(folder)
        last_step = 0 if resume_step is None else resume_step
        for path in folder.glob(f"step-*-rank{rank}.parquet"):
            if _step_of(path.name) > last_step:
                path.unlink()
            elif run_id is not None:
                _check_run(path, run_id)
        self._keep_sums(last_step)

    def _keep_sums(self, last_step: int) -> None:
        """Take the sums of later steps out of the list, and warn about missing files of the other steps.

        Files of an earlier version, which wrote no sums, get them now, with a warning.
        """
        paths = sorted(self._folder.glob(f"step-*-rank{self._rank}.parquet"))
        if paths and not self._sums.exists():
            logger.warning("%d rollout files in %s are of an earlier version, and get their digests now, as they are",
                           len(paths), self._folder)  # fmt: skip
            sums = {path.name: sha256_of_file(path) for path in paths}
        else:
            sums = _read_sums(self._sums)
        sums = {name: digest for name, digest in sums.items() if _step_of(name) <= last_step}
        _say_missing(self._folder, sums.keys() - {path.name for path in paths})
        write_atomically(self._sums, "".join(_sum_line(name, digest) for name, digest in sums.items()))

    def append(
        self, step: int, rollouts: Sequence[Rollout], *, advantages: Sequence[Sequence[float] | None] | None = None
    ) -> Path:
        """Write the rollouts of a step, once a step, and return the file.

        Args:
            advantages: advantage of each completion, by rollout; None, which is null in the file, for rollouts that
                were not trained on.
        """
        names = {name: None for rollout in rollouts for name in rollout.reward_parts}
        types = COLUMNS | {f"reward/{name}": pa.float64() for name in names}
        rows = [
            row
            for i, rollout in enumerate(rollouts)
            for row in _rows(step, rollout, None if advantages is None else advantages[i])
        ]
        metadata = {} if self._run_id is None else {RUN_KEY: self._run_id.encode()}
        table = pa.Table.from_pylist(rows, schema=pa.schema(types.items(), metadata=metadata))
        path = self._folder / f"step-{step:08d}-rank{self._rank}.parquet"
        with writing(path, "the rollouts"), replacing(path) as temporary:
            pq.write_table(table, temporary, compression="zstd")
            with self._sums.open("a") as file:  # before the file has its name, so that no file is without a sum
                file.write(_sum_line(path.name, sha256_of_file(temporary)))
                file.flush()
                os.fsync(file.fileno())
        return path


def clear_ranks_without_process(num_ranks: int, folder: Path, resume_step: int | None, run_id: str | None) -> None:
    """Remove the rollouts of steps after `resume_step` that ranks wrote which the run does not have any more.

    Args:
        num_ranks: of the run as it is now.

    Raises:
        DataError: see `RolloutStore`.
    """
    ranks = {int(path.name.removeprefix(SUMS)) for path in folder.glob(f"{SUMS}*")}
    for rank in sorted(ranks - set(range(num_ranks))):
        RolloutStore(folder, resume_step=resume_step, rank=rank, run_id=run_id)


def read_rollouts(folder: Path) -> pa.Table:
    """Return all rollouts in a folder, in the order of steps, with a warning about missing files.

    A column that the files of an earlier version lack is null in their rows.

    Raises:
        DataError: a file was changed or is damaged.
    """
    paths = sorted(folder.glob(PATTERN))
    _check_sums(folder, paths)
    if not paths:
        return pa.schema(COLUMNS.items()).empty_table()
    schema = pa.unify_schemas([*map(pq.read_schema, paths), pa.schema(COLUMNS.items())])
    return ds.dataset([str(path) for path in paths], schema=schema).to_table()


def _check_run(path: Path, run_id: str) -> None:
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (OSError, pa.ArrowException):  # damaged: `read_rollouts` notices that by its digest
        return
    run_in_file = metadata.get(RUN_KEY, run_id.encode()).decode(errors="replace")
    if run_in_file != run_id:
        raise DataError(
            f"{path} must hold rollouts of the run {run_id}, and is of the run {run_in_file}; put the right file "
            "back, or remove it to go on without these rollouts"
        )


def _check_sums(folder: Path, paths: Sequence[Path]) -> None:
    files = sorted(folder.glob(f"{SUMS}*"))
    if not files:
        if paths:
            logger.warning("the rollouts in %s are of an earlier version, which kept no digests", folder)
        return
    sums = {name: digest for file in files for name, digest in _read_sums(file).items()}
    for path in paths:
        if sums.get(path.name) != sha256_of_file(path):
            raise DataError(
                f"{path} is damaged: its SHA-256 is not the one in {SUMS}*; restore it from a copy, or remove it to "
                "read the other steps (a run goes on without it)"
            )
    _say_missing(folder, sums.keys() - {path.name for path in paths})


def _say_missing(folder: Path, names: Set[str]) -> None:
    if names:
        logger.warning("%d rollout files in %s are missing, first %s", len(names), folder, min(names))


def _step_of(name: str) -> int:
    """Return the step in a file's name; 0 for a name of another form, as in a damaged list."""
    step = name.removeprefix("step-").partition("-")[0]
    return int(step) if step.isascii() and step.isdigit() else 0


def _read_sums(file: Path) -> dict[str, str]:
    """Return the sums by the names of files, without a last line that a crash cut short."""
    if not file.exists():
        return {}
    text = file.read_text(encoding="utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()
    return {name: digest for digest, _, name in (line.partition("  ") for line in lines)}


def _sum_line(name: str, digest: str) -> str:
    return f"{digest}  {name}\n"


def _number(value: float) -> float | None:
    """Return None for nan: a mean over a column skips nulls, but not nan."""
    return None if math.isnan(value) else value


def _rows(step: int, rollout: Rollout, advantages: Sequence[float] | None) -> Iterator[dict[str, Any]]:
    """Yield one row for each completion of a group."""
    prompt = rollout.prompt
    group = {
        "step": step,
        "prompt_index": prompt.index,
        "prompt": message_text(prompt.text),
        "row": json.dumps(dict(prompt.columns), default=str),
        "prompt_ids": list(prompt.token_ids),
    }
    for j, completion in enumerate(rollout.completions):
        yield (
            group
            | {
                "sample_index": j,
                "completion": completion.text,
                "token_ids": list(completion.token_ids),
                "logprobs": list(completion.logprobs),
                "raw_logprobs": None if completion.raw_logprobs is None else list(completion.raw_logprobs),
                "reward": _number(rollout.rewards[j]) if rollout.rewards else None,
                "advantage": None if advantages is None else float(advantages[j]),
                "finish_reason": completion.finish_reason,
                "policy_version": completion.policy_versions[0] if completion.policy_versions else None,
                "writers": None if all(completion.policy_tokens) else list(completion.writers or ()),
            }
            | {f"reward/{name}": values[j] for name, values in rollout.reward_parts.items()}
        )
