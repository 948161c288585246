"""Sequence-level distillation: a teacher's own completions, those that a reward approves, as supervised examples.

Kim & Rush (2016), arXiv:1606.07947, train a student on what its teacher writes. Kept by a reward it is rejection
sampling, as in STaR (arXiv:2203.14465) and Llama 2 (arXiv:2307.09288, Sec. 3.2.3).
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import random
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from alignlab.atomic_files import make_folder, write_atomically
from alignlab.config.render import RenderSettings
from alignlab.config.rollout import SamplingSettings
from alignlab.data.examples import completion_example
from alignlab.data.messages import BadRow
from alignlab.data.rendering import PromptRenderer
from alignlab.data.special_text import unmarked
from alignlab.digests import digest_of_values
from alignlab.errors import ConfigError, DataError
from alignlab.library_errors import writing
from alignlab.rollout.detokenizer import special_ids
from alignlab.training.journal import journal_lines, read_journal
from alignlab.training.reward_runner import RewardRunner
from alignlab.types import Completion, Prompt, Rollout, RolloutEngine

logger = logging.getLogger(__name__)
Keep = Literal["all", "best"]
REJECTIONS = ("truncated", "empty", "no_reward", "below_min_reward", "duplicate", "not_best", "rendered_otherwise")
COUNTS = ("prompts", "prompts_without", "completions", "kept", "reward_failures", *REJECTIONS)
_PARTIAL = ".partial"


@dataclass(frozen=True)
class SampleSettings:
    """What is drawn and what is kept.

    Attributes:
        sampling: of the teacher.
        num_samples: completions a prompt.
        min_reward: what a completion's reward must reach; None asks for no reward.
        keep: "all" that reach it, each text once; or the one with the highest reward.
        prompts_at_once: prompts between two times that the work is put on disk.
        seed: of the sampling.
    """

    sampling: SamplingSettings
    num_samples: int = 8
    min_reward: float | None = None
    keep: Keep = "all"
    prompts_at_once: int = 32
    seed: int = 0

    def check(self, num_rewards: int) -> None:
        """Refuse what would do nothing.

        Raises:
            ConfigError: with the setting to blame.
        """
        for name, value in (("num_samples", self.num_samples), ("prompts_at_once", self.prompts_at_once)):
            if value < 1:
                raise ConfigError(f"{name} is {value}, and must be at least 1; use 1 or more")
        if self.sampling.temperature == 0 and self.num_samples > 1:
            raise ConfigError(
                f"num_samples is {self.num_samples}, and must be 1 at temperature 0, where all completions of a prompt "
                "are one; use 1, or temperature 1.0"
            )
        if num_rewards == 0 and (self.min_reward is not None or self.keep == "best"):
            blamed = "keep is best" if self.keep == "best" else f"min_reward is {self.min_reward}"
            raise ConfigError(f"{blamed}, and must be left out where there are no rewards; name one")


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
    """Write the kept completions to `output`, one JSON row each, to be read by supervised fine-tuning.

    A row has `prompt` and `completion`, as chat messages where prompts are chats and as rendered text elsewhere, so
    that the example has the very prompt tokens that the teacher saw; and `reward` and `row`, of the prompt's dataset.
    Until all is done the work is in `output` + ".partial", from which a second call goes on: prompts done are not done
    again, but for what is damaged, and the result is the same. Completions cut off by the length limit are never kept.

    Args:
        rewards: of which a completion's sum must reach `settings.min_reward`; may hold none.
        render: how the prompts were rendered.
        identity: what the samples depend on besides, such as the model: a partial file of others is refused.

    Returns:
        Counts: prompts, prompts_without (nothing kept), completions, kept, reward_failures (calls), and of what was not
        kept each of `REJECTIONS`.

    Raises:
        ConfigError: `output` exists, is being written by another process, or was begun with other settings.
        DataError: nothing was kept.
        RewardError: more reward calls failed than the rewards' limits allow.
    """
    settings.check(len(rewards.rewards))
    if output.exists():
        raise ConfigError(f"{output} exists, and is not overwritten; remove it, or choose another output")
    make_folder(output.parent)
    told = {"settings": repr(settings), "prompts": _digest(prompts), **identity}
    partial = output.with_name(output.name + _PARTIAL)
    with partial.open("a+", encoding="utf-8") as file:
        chunks = _begun(file, partial, told)
        for start in range(len(chunks) * settings.prompts_at_once, len(prompts), settings.prompts_at_once):
            part = prompts[start : start + settings.prompts_at_once]
            chunks.append(_sample_chunk(engine, part, rewards, render, settings, start))
            _append(file, chunks[-1], number=len(chunks) + 1)
            _report(chunks, len(prompts))
        counts = _totals(chunks)
        if not counts["kept"]:
            partial.unlink()
            of = f"none of {counts['completions']} completions was kept"
            raise DataError(f"{of}, and fine-tuning needs some ({rejected(counts)}); lower min_reward, or train first")
        rows = [row for chunk in chunks for row in chunk["rows"]]
        write_atomically(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        partial.unlink()
    return counts


def rejected(counts: Mapping[str, int]) -> str:
    """How many completions were left out, by reason."""
    return ", ".join(f"{name} {counts[name]}" for name in REJECTIONS if counts.get(name)) or "nothing left out"


def select(rollout: Rollout, *, min_reward: float | None, keep: Keep) -> tuple[list[int], Counter[str]]:
    """Which of a prompt's scored completions are kept, and how many are not by reason."""
    kept: list[int] = []
    counts: Counter[str] = Counter()
    texts: set[str] = set()
    for i, (completion, reward) in enumerate(zip(rollout.completions, rollout.rewards, strict=True)):
        reason = _rejection(completion.text, completion.finish_reason, reward, min_reward, needs=keep == "best")
        if reason is None and completion.text in texts:
            reason = "duplicate"
        if reason is None:
            kept.append(i)
            texts.add(completion.text)
        else:
            counts[reason] += 1
    if keep == "best" and kept:
        best = max(kept, key=lambda i: rollout.rewards[i])  # the first of equals
        counts["not_best"] += len(kept) - 1
        kept = [best]
    return kept, counts


def _rejection(
    text: str, finish_reason: str, reward: float, min_reward: float | None, *, needs: bool
) -> str | None:
    if finish_reason != "stop":
        return "truncated"
    if not text.strip():
        return "empty"
    if math.isnan(reward):
        return "no_reward" if needs or min_reward is not None else None
    return "below_min_reward" if min_reward is not None and reward < min_reward else None


def _sample_chunk(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    rewards: RewardRunner,
    render: PromptRenderer,
    settings: SampleSettings,
    start: int,
) -> dict[str, Any]:
    """The rows of some prompts, and counts."""
    bare, failures = plainly(render), rewards.num_failures
    seed = random.Random(f"{settings.seed}/{start}").getrandbits(62)
    sampling = settings.sampling.params(n=settings.num_samples, seed=seed)
    rollouts = rewards.score(engine.generate(prompts, sampling))
    rows: list[dict[str, Any]] = []
    counts: Counter[str] = Counter(prompts=len(prompts), completions=len(prompts) * settings.num_samples)
    for rollout in rollouts:
        kept, left_out = select(rollout, min_reward=settings.min_reward, keep=settings.keep)
        found = [row for row in (_row(rollout, i, render, bare) for i in kept) if row is not None]
        counts.update(left_out)
        counts.update(rendered_otherwise=len(kept) - len(found), kept=len(found), prompts_without=int(not found))
        rows += found
    counts["reward_failures"] = rewards.num_failures - failures
    return {"rows": rows, "counts": dict(counts)}


def _row(rollout: Rollout, i: int, render: PromptRenderer, bare: PromptRenderer) -> dict[str, Any] | None:
    """One kept completion; None where a supervised example would not be what the teacher saw and wrote.

    Args:
        bare: renders the row when it is read again, see `plainly`.
    """
    prompt, completion, reward = rollout.prompt, rollout.completions[i], rollout.rewards[i]
    render = render.of_row(prompt.columns, prompt.index)
    row: dict[str, Any] = {"prompt": unmarked(render(prompt.text)), "completion": completion.text}
    if render.chat:
        row["prompt"] = [dict(message) for message in render.messages(prompt.text)]
        row["completion"] = [{"role": "assistant", "content": completion.text}]
        row |= render.template_columns
    try:
        example = completion_example(row["prompt"], row["completion"], bare.of_row(row, prompt.index))
    except BadRow:
        return None
    if not _wrote(completion, render):
        return None
    length = len(prompt.token_ids)
    if example.token_ids[:length] != prompt.token_ids or example.completion_mask.index(True) != length:
        return None
    return row | {"reward": None if math.isnan(reward) else reward, "row": prompt.index}


def _wrote(completion: Completion, render: PromptRenderer) -> bool:
    """Whether the text is all that was sampled: no half character, and no special token but tags and the end."""
    tokenizer = render.tokenizer
    special = special_ids(tokenizer)
    ids = completion.token_ids
    if special.structure.intersection(ids[:-1]) or "\ufffd" in completion.text:
        return False
    # The last token may be the end, or a tag that the text ends with. A stop string may follow the text; a tokenizer
    # may put a space before it.
    said = ids[:-1] if ids and ids[-1] in special.structure else ids
    return str(tokenizer.decode(list(said))).lstrip().startswith(completion.text.lstrip())


def plainly(render: PromptRenderer) -> PromptRenderer:
    """The renderer by which the rows are read again: what stands around a prompt is written in them."""
    settings = render.settings
    bare = RenderSettings(
        chat=render.chat, max_prompt_tokens=settings.max_prompt_tokens, template_date=settings.template_date
    )
    return PromptRenderer(bare, render.tokenizer, notices=render.notices)


def _digest(prompts: Sequence[Prompt]) -> str:
    """Of what the samples and their rewards depend on: each prompt's row, tokens and columns."""
    return digest_of_values((p.index, p.token_ids, p.text, p.columns) for p in prompts)


def _begun(file: IO[str], path: Path, told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What an earlier call has done, up to the first line that is damaged; a new file gets its first line."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"another process is writing {path}; wait for it, or choose another output") from None
    content = read_journal(path)
    if not content.rows and not content.damage:
        file.truncate(0)
        _append(file, told, number=1)
        return []
    rows = content.rows[: content.num_intact]
    if not rows or not content.has_digests:
        raise ConfigError(
            f"{path} is damaged in its first line, which says what it was begun with, or is of an earlier version; "
            "remove it to begin again"
        )
    if rows[0] != json.loads(json.dumps(told)):
        raise ConfigError(
            f"{path} was begun with another model, other data or other settings; go on with those, or remove it"
        )
    if content.damage:
        logger.warning("%s: %s; what follows is sampled again", path, "; ".join(content.damage))
    file.truncate(content.ends[len(rows) - 1])
    file.seek(0, os.SEEK_END)
    return rows[1:]


def _append(file: IO[str], value: Mapping[str, Any], *, number: int) -> None:
    with writing(file.name, "the samples"):
        file.write(journal_lines([value], first=number))
        file.flush()
        os.fsync(file.fileno())



def _totals(chunks: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    return {name: sum(chunk["counts"].get(name, 0) for chunk in chunks) for name in COUNTS}


def _report(chunks: Sequence[Mapping[str, Any]], num_prompts: int) -> None:
    totals = _totals(chunks)
    share = totals["kept"] / max(totals["completions"], 1)
    done = f"{totals['prompts']} of {num_prompts} prompts, {totals['kept']} completions kept ({share:.0%})"
    print(f"alignlab: {done}", file=sys.stderr, flush=True)
