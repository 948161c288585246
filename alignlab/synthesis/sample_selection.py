"""Selection of a teacher's completions: by reward, each text once, and only what a supervised row says exactly."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, Literal

from alignlab.config.data import RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.chat.special_text import unmarked
from alignlab.data.examples import completion_example
from alignlab.data.rendering import PromptRenderer
from alignlab.rollout.detokenizer import special_ids
from alignlab.types import Completion, Rollout

Keep = Literal["all", "best"]
REJECTIONS = ("truncated", "empty", "no_reward", "below_min_reward", "duplicate", "not_best", "rendered_otherwise")
"""Reasons why a completion is left out."""


def select(rollout: Rollout, *, min_reward: float | None, keep: Keep) -> tuple[list[int], Counter[str]]:
    """Select completions of a scored rollout.

    Args:
        rollout: a prompt's completions with their rewards.
        min_reward: least reward of a selected completion; None selects completions without a reward too.
        keep: "all" of them, each text once; or the "best", the first with the highest reward.

    Returns:
        (indices of the selected completions, number of others by reason).
    """
    selected: list[int] = []
    rejected: Counter[str] = Counter()
    texts: set[str] = set()
    for i, (completion, reward) in enumerate(zip(rollout.completions, rollout.rewards, strict=True)):
        reason = _rejection(completion, reward, min_reward, needs_reward=keep == "best")
        if reason is None and completion.text in texts:
            reason = "duplicate"
        if reason is None:
            selected.append(i)
            texts.add(completion.text)
        else:
            rejected[reason] += 1
    if keep == "best" and selected:
        best = max(selected, key=lambda i: rollout.rewards[i])  # max returns the first of equals
        rejected["not_best"] += len(selected) - 1
        selected = [best]
    return selected, rejected


def _rejection(
    completion: Completion, reward: float, min_reward: float | None, *, needs_reward: bool
) -> str | None:
    """Return why a completion is left out; None if it is not."""
    if completion.finish_reason != "stop":
        return "truncated"
    if not completion.text.strip():
        return "empty"
    if math.isnan(reward):
        return "no_reward" if needs_reward or min_reward is not None else None
    return "below_min_reward" if min_reward is not None and reward < min_reward else None


class SampleRows:
    """Makes supervised rows of completions.

    Args:
        render: how the prompts were rendered when the teacher saw them.
    """

    def __init__(self, render: PromptRenderer) -> None:
        self._render = render
        # The rows hold what system prompt and template have added, so that they are read without these settings.
        bare = RenderSettings(
            chat=render.chat,
            max_prompt_tokens=render.settings.max_prompt_tokens,
            template_date=render.settings.template_date,
        )
        self._reader = PromptRenderer(bare, render.tokenizer, notices=render.notices)

    def row(self, rollout: Rollout, i: int) -> dict[str, Any] | None:
        """Return the row of one completion; None if its example would differ from what the teacher saw and wrote."""
        prompt, completion, reward = rollout.prompt, rollout.completions[i], rollout.rewards[i]
        render = self._render.of_row(prompt.columns, prompt.index)
        row: dict[str, Any] = {"prompt": unmarked(render(prompt.text)), "completion": completion.text}
        if render.chat:
            row["prompt"] = [dict(message) for message in render.messages(prompt.text)]
            row["completion"] = [{"role": "assistant", "content": completion.text}]
            row |= render.template_columns
        try:
            example = completion_example(row["prompt"], row["completion"], self._reader.of_row(row, prompt.index))
        except BadRow:
            return None
        if not _text_is_all(completion, render):
            return None
        length = len(prompt.token_ids)
        if example.token_ids[:length] != prompt.token_ids or example.completion_mask.index(True) != length:
            return None
        return row | {"reward": None if math.isnan(reward) else reward, "row": prompt.index}


def _text_is_all(completion: Completion, render: PromptRenderer) -> bool:
    """Return whether the text holds all that was sampled: no half character, no special token but the end."""
    tokenizer = render.tokenizer
    special = special_ids(tokenizer)
    ids = completion.token_ids
    if special.structure.intersection(ids[:-1]) or "\ufffd" in completion.text:
        return False
    # The last token may be the end, or a tag that the text ends with. A stop string may follow the text; a tokenizer
    # may put a space before the text.
    content = ids[:-1] if ids and ids[-1] in special.structure else ids
    return str(tokenizer.decode(list(content))).lstrip().startswith(completion.text.lstrip())
