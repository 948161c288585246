"""Sequence-level distillation: a teacher's completions, filtered by rewards, written as supervised rows.

Kim & Rush (2016), arXiv:1606.07947, train a student on what its teacher writes. Filtered by a reward it is rejection
sampling, as in STaR (arXiv:2203.14465) and Llama 2 (arXiv:2307.09288, Sec. 3.2.3).
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import random
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignlab.config.rollout import SamplingSettings
from alignlab.data.rendering import PromptRenderer
from alignlab.errors import ConfigError, DataError
from alignlab.files.atomic_files import make_folder, write_atomically
from alignlab.files.digests import digest_of_values
from alignlab.rollout.engine import RolloutEngine
from alignlab.runs.journal import Journal, read_journal
from alignlab.scoring.runner import RewardRunner
from alignlab.synthesis.sample_selection import REJECTIONS, Keep, SampleRows, select
from alignlab.types import Prompt

logger = logging.getLogger(__name__)
COUNTS = ("prompts", "prompts_without", "completions", "kept", "reward_failures", *REJECTIONS)
_PARTIAL = ".partial"


@dataclass(frozen=True)
class SampleSettings:
    """Settings of sampling and selection.

    Attributes:
        sampling: the teacher's sampling settings.
        num_samples: completions a prompt.
        min_reward: least reward of a kept completion; None asks for no reward.
        keep: "all" such completions, each text once; or the "best" one of a prompt.
        prompts_at_once: prompts that are sampled, and written to the disk, together.
        seed: seed of the sampling.
    """

    sampling: SamplingSettings
    num_samples: int = 8
    min_reward: float | None = None
    keep: Keep = "all"
    prompts_at_once: int = 32
    seed: int = 0

    def check(self, num_rewards: int) -> None:
        """Raise if a setting is out of range or would do nothing.

        Raises:
            ConfigError: the message names the setting.
        """
        self._check_numbers()
        if self.sampling.temperature == 0 and self.num_samples > 1:
            raise ConfigError(
                f"num_samples is {self.num_samples}, and must be 1 at temperature 0, where all completions of a prompt "
                "are one; use 1, or temperature 1.0"
            )
        if num_rewards == 0:
            self._check_without_rewards()

    def _check_numbers(self) -> None:
        for name, value in (("num_samples", self.num_samples), ("prompts_at_once", self.prompts_at_once)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, and must be at least 1; use 1 or more")
        if self.min_reward is not None and math.isnan(self.min_reward):
            raise ConfigError("min_reward is nan, which no reward is compared with; use a number")

    def _check_without_rewards(self) -> None:
        if self.keep == "best" or self.min_reward is not None:
            setting = "keep is best" if self.keep == "best" else f"min_reward is {self.min_reward}"
            raise ConfigError(f"{setting}, and must be left out where there are no rewards; name one")


def sample_teacher(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    rewards: RewardRunner,
    render: PromptRenderer,
    output: Path,
    settings: SampleSettings,
    *,
    identity: Mapping[str, Any],
) -> dict[str, int]:
    """Write the kept completions to `output`, one JSON row each, for supervised fine-tuning.

    A row has `prompt` and `completion` (chat messages of a chat, else rendered text, so that the example has exactly
    the prompt tokens that the teacher saw), `reward`, and `row`, the prompt's number in its dataset. Truncated
    completions are never kept.

    Until all is done the work is in the journal `output` + ".partial", from which a second call resumes. Only damaged
    parts are sampled again, with the same result.

    Args:
        engine: the teacher's engine.
        prompts: the prompts.
        rewards: score the completions; may hold no reward.
        render: how the prompts were rendered.
        output: the file to write; must not exist.
        settings: settings of sampling and selection.
        identity: further facts that the samples depend on, such as the model; a journal of other facts is refused.

    Returns:
        Counts: prompts, prompts_without (prompts without a kept completion), completions, kept, reward_failures
        (failed calls), and completions left out by each of `REJECTIONS`.

    Raises:
        ConfigError: `output` exists, another process is writing it, or its journal was begun with other settings.
        DataError: no completion was kept.
        RewardError: more reward calls failed than the rewards' limits allow.
    """
    settings.check(len(rewards.rewards))
    if output.exists():
        raise ConfigError(f"{output} exists, and is not overwritten; remove it, or choose another output")
    make_folder(output.parent)
    facts = {"settings": repr(settings), "prompts": _digest(prompts), **identity}
    partial = output.with_name(output.name + _PARTIAL)
    with _locked(partial):
        journal = _open_journal(partial, facts)
        rows = SampleRows(render)
        num_done = (len(journal.rows) - 1) * settings.prompts_at_once
        for start in range(num_done, len(prompts), settings.prompts_at_once):
            chunk = prompts[start : start + settings.prompts_at_once]
            journal.append([_sample_chunk(engine, chunk, rewards, rows, settings, start)])
            _show_progress(journal.rows[1:], len(prompts))
        chunks = journal.rows[1:]
        counts = _totals(chunks)
        if not counts["kept"]:
            partial.unlink()
            raise DataError(
                f"none of {counts['completions']} completions was kept, and fine-tuning needs some "
                f"({describe_rejected(counts)}); lower min_reward, or train first"
            )
        kept_rows = [row for chunk in chunks for row in chunk["rows"]]
        write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept_rows))
        partial.unlink()
    return counts


def describe_rejected(counts: Mapping[str, int]) -> str:
    """Return how many completions were left out, by reason, as a text."""
    return ", ".join(f"{name} {counts[name]}" for name in REJECTIONS if counts.get(name)) or "nothing left out"


def _sample_chunk(
    engine: RolloutEngine, prompts: Sequence[Prompt], rewards: RewardRunner, rows: SampleRows,
    settings: SampleSettings, start: int,
) -> dict[str, Any]:
    """Return the journal's row of some prompts: the rows of their kept completions, and counts."""
    failures_before = rewards.num_failures
    seed = random.Random(f"{settings.seed}/{start}").getrandbits(62)
    sampling = settings.sampling.params(n=settings.num_samples, seed=seed)
    kept_rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter(prompts=len(prompts), completions=len(prompts) * settings.num_samples)
    for rollout in rewards.score(engine.generate(prompts, sampling)):
        selected, rejected = select(rollout, min_reward=settings.min_reward, keep=settings.keep)
        rows_of_prompt = [row for row in (rows.row(rollout, i) for i in selected) if row is not None]
        num_kept = len(rows_of_prompt)
        counts.update(rejected)
        counts.update(kept=num_kept, rendered_otherwise=len(selected) - num_kept, prompts_without=int(not num_kept))
        kept_rows += rows_of_prompt
    counts["reward_failures"] = rewards.num_failures - failures_before
    return {"rows": kept_rows, "counts": dict(counts)}


def _digest(prompts: Sequence[Prompt]) -> str:
    """Return a digest of what the samples and their rewards depend on: each prompt's row, tokens and columns."""
    return digest_of_values((p.index, p.token_ids, p.text, p.columns) for p in prompts)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock on a file, which is made if absent.

    Raises:
        ConfigError: another process holds it.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is writing {path}; wait for it, or choose another output") from None
        yield


def _open_journal(path: Path, facts: Mapping[str, Any]) -> Journal:
    """Return the journal of an earlier call, up to the first damaged line; a new one begins with the facts.

    Raises:
        ConfigError: the journal was begun with other facts, or its first line is damaged.
    """
    content = read_journal(path)
    is_new = not content.rows and not content.damage
    if not is_new and not (content.num_intact and content.has_digests):
        raise ConfigError(
            f"{path} is damaged in its first line, which says what it was begun with, or is of an earlier version; "
            "remove it to begin again"
        )
    if not is_new and content.rows[0] != json.loads(json.dumps(facts)):
        raise ConfigError(
            f"{path} was begun with another model, other data or other settings; go on with those, or remove it"
        )
    journal = Journal(path, in_order=True)
    if journal.damage:
        logger.warning("%s: %s; what follows is sampled again", path, "; ".join(journal.damage))
    if is_new:
        journal.append([facts])
    return journal


def _totals(chunks: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(chunk["counts"].get(name, 0) for chunk in chunks) for name in COUNTS}


def _show_progress(chunks: Sequence[Mapping[str, Any]], num_prompts: int) -> None:
    totals = _totals(chunks)
    share = totals["kept"] / max(totals["completions"], 1)
    progress = f"{totals['prompts']} of {num_prompts} prompts, {totals['kept']} completions kept ({share:.0%})"
    print(f"alignlab: {progress}", file=sys.stderr, flush=True)
