"""One pool of samples of each problem, drawn once and kept as a file, from which all strategies are computed.

The file is a journal (`runs.journal`): a line that names what the samples depend on, then a line for each problem, each
with a digest of itself. Drawing that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.errors import CheckpointError, ConfigError
from alignlab.files.digests import as_json, digest_of_values
from alignlab.runs.journal import Journal, read_journal
from alignlab.types import Completion, Prompt, Rollout

FACTS, PROBLEM = "facts", "problem"
PROMPTS_AT_ONCE = 32
"""Prompts that are sampled, and written to the disk, together."""
Draw = Callable[[Sequence[Prompt]], Sequence[Rollout]]
"""Samples all completions of prompts; equal prompts come in one call, so that their samples differ."""


@dataclass(frozen=True)
class Pool:
    """The samples of some problems.

    Attributes:
        facts: what the samples depend on: the model, the sampling, the seed, the number of samples.
        rollouts: a problem with its samples each, in the order of the data; each completion with the log-probs of its
            tokens.
    """

    facts: Mapping[str, Any]
    rollouts: tuple[Rollout, ...]

    @property
    def num_samples(self) -> int:
        """Samples of each problem."""
        return len(self.rollouts[0].completions)


def draw_pool(prompts: Sequence[Prompt], facts: Mapping[str, Any], draw: Draw, path: Path | None = None) -> Pool:
    """Return the samples of all problems; draw those that the file does not hold yet, and write them to it.

    Args:
        prompts: the problems, at least one.
        facts: what the samples depend on, as JSON.
        draw: see `Draw`; not called where the file holds all.
        path: of the file; None keeps the samples in memory alone.

    Raises:
        ConfigError: there are no problems.
        CheckpointError: the file holds other samples; see `missing_prompts`.
    """
    if not prompts:
        raise ConfigError("a pool needs at least one problem, and got 0; check eval_data")
    rollouts = {} if path is None else _stored(path, prompts, facts)
    journal = None if path is None else Journal(path)
    if journal is not None and not journal.rows:
        journal.append([{FACTS: dict(facts)}])
    for rows in _batches(prompts, done=rollouts.keys()):
        drawn = zip(rows, draw([prompts[row] for row in rows]), strict=True)
        new = {row: rollout for row, rollout in drawn if row not in rollouts}
        if journal is not None:
            journal.append([_line(row, rollout) for row, rollout in new.items()])
        rollouts |= new
    return Pool(facts, tuple(rollouts[row] for row in range(len(prompts))))


def is_complete(path: Path, prompts: Sequence[Prompt], facts: Mapping[str, Any]) -> bool:
    """Return whether a file holds the samples of all problems, so that no model is needed.

    Raises:
        CheckpointError: it holds samples of another model, of other sampling or other problems.
    """
    return len(_stored(path, prompts, facts)) == len(prompts)


def read_pool(path: Path, prompts: Sequence[Prompt]) -> Pool:
    """Return the pool in a file.

    Raises:
        CheckpointError: there is no such file, it is damaged, or lacks a problem.
    """
    rows = read_journal(path).rows
    if not rows or FACTS not in rows[0]:
        raise CheckpointError(f"{path} must be the file of a pool, and has no line of facts; draw one with --pool")
    rollouts = _stored(path, prompts, rows[0][FACTS])
    if len(rollouts) < len(prompts):
        raise CheckpointError(
            f"{path} must hold samples of all {len(prompts)} problems, and holds {len(rollouts)}; run the command that "
            "drew it again, which draws the rest"
        )
    return Pool(rows[0][FACTS], tuple(rollouts[row] for row in range(len(prompts))))


def _stored(path: Path, prompts: Sequence[Prompt], facts: Mapping[str, Any]) -> dict[int, Rollout]:
    """Return the stored samples by the row of their problem.

    Raises:
        CheckpointError: the file holds something else, or samples that depend on other facts.
    """
    rows = read_journal(path).rows
    if not rows:
        return {}
    recorded = rows[0].get(FACTS)
    if recorded is None:
        raise CheckpointError(f"{path} must be the file of a pool, and has no line of facts; choose another --pool")
    wanted = json.loads(json.dumps(dict(facts)))
    changed = [name for name in {**recorded, **wanted} if recorded.get(name) != wanted.get(name)]
    if changed:
        name = changed[0]
        raise CheckpointError(
            f"{path} holds samples whose {' and '.join(changed)} differ from what is asked for ({name}: "
            f"{recorded.get(name)!r:.60}, now {wanted.get(name)!r:.60}); give another --pool folder, or remove the file"
        )
    return {row["row"]: _rollout(row, prompts, path) for row in rows if PROBLEM in row and row["row"] < len(prompts)}


def _rollout(row: Mapping[str, Any], prompts: Sequence[Prompt], path: Path) -> Rollout:
    prompt = prompts[row["row"]]
    if row[PROBLEM] != _digest(prompt):
        raise CheckpointError(
            f"{path} holds samples of another problem than number {row['row']} of the data; give another --pool "
            "folder, or remove the file"
        )
    return Rollout(prompt, tuple(_completion(values) for values in row["completions"]))


def _batches(prompts: Sequence[Prompt], done: Collection[int]) -> Iterator[list[int]]:
    """Yield the rows of the prompts that are drawn together, until none is missing.

    Equal prompts are drawn together, those among them that are done too: an engine numbers their samples, so that each
    has a seed of its own.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt.token_ids, []).append(row)
    missing = [rows for rows in groups.values() if not all(row in done for row in rows)]
    batch: list[int] = []
    for rows in missing:
        batch += rows
        if len(batch) >= PROMPTS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


def _digest(prompt: Prompt) -> str:
    return digest_of_values([prompt.token_ids, prompt.text, as_json(dict(prompt.columns))])


def _line(row: int, rollout: Rollout) -> dict[str, Any]:
    completions = [
        {
            "text": completion.text, "token_ids": completion.token_ids, "logprobs": completion.logprobs,
            "raw_logprobs": completion.raw_logprobs, "finish_reason": completion.finish_reason,
            "writers": completion.writers,
        }
        for completion in rollout.completions
    ]  # fmt: skip
    return {PROBLEM: _digest(rollout.prompt), "row": row, "completions": completions}


def _completion(values: Mapping[str, Any]) -> Completion:
    return Completion.of(
        values["token_ids"], values["text"], logprobs=values["logprobs"], raw_logprobs=values["raw_logprobs"],
        finish_reason=values["finish_reason"], writers=values["writers"],
    )
