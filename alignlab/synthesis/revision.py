"""Critique and revision: a completion is criticised by a principle and rewritten; the last version is trained on.

Bai et al. (2022), Constitutional AI, arXiv:2212.08073, Sec. 3.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, TypeGuard

from alignlab.config.judge import Constitution, Principle
from alignlab.data.chat.tool_calls import template_columns
from alignlab.scoring.judges import questions
from alignlab.scoring.judges.chat_model import ChatModel, Failure, raise_if_down
from alignlab.synthesis.prompt_journal import prompt_json
from alignlab.types import Rollout, message_text

Row = dict[str, Any]


class Reviser:
    """Criticises and revises completions.

    Args:
        model: writes critiques and revisions.
        constitution: its principles are drawn for each prompt, without replacement until all have been drawn.
        num_revisions: revisions of each completion, >= 1.
        max_new_tokens: limit of a critique and of a revision.
        temperature: sampling temperature of critiques and revisions.
        seed: seed of the principles and of the texts.
    """

    def __init__(
        self, model: ChatModel, constitution: Constitution, *, num_revisions: int, max_new_tokens: int,
        temperature: float, seed: int,
    ) -> None:
        self.model, self.constitution = model, constitution
        self.num_revisions, self.seed = num_revisions, seed
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    def revise(self, rollouts: Sequence[Rollout]) -> list[Row]:
        """Return a row for the first completion of each prompt.

        Returns:
            Rows with index, prompt, what its chat template was given, answer, critiques, completion (the last revision;
            None where a text was not written), and outcome: revised, empty (a text was empty), or the kind of a
            failure.

        Raises:
            JudgeError: the critic answers nothing at all.
        """
        rows = [_row(rollout) for rollout in rollouts]
        for number in range(self.num_revisions):
            self._revise_once(rows, number)
        for row in rows:
            if row["outcome"] != "revised":
                row["completion"] = None
        return rows

    def _revise_once(self, rows: Sequence[Row], number: int) -> None:
        """Criticise and revise, once, each row whose last text was written."""
        active = [row for row in rows if row["outcome"] == "revised"]
        critiques = [
            questions.critique(self.constitution, self._principle(row, number), row["prompt"], row["completion"])
            for row in active
        ]
        for row, text in zip(active, self._write(critiques, 2 * number), strict=True):
            if _is_written(text, row):
                row["critiques"].append(text.strip())
        active = [row for row in active if row["outcome"] == "revised"]
        revisions = [
            questions.revision(
                self.constitution, self._principle(row, number), row["prompt"], row["completion"], row["critiques"][-1]
            )
            for row in active
        ]
        for row, text in zip(active, self._write(revisions, 2 * number + 1), strict=True):
            if _is_written(text, row):
                row["completion"] = text.strip()

    def _write(self, conversations: Sequence[Any], turn: int) -> list[str | Failure]:
        if not conversations:
            return []
        seed = random.Random(f"{self.seed}/{turn}").getrandbits(31)
        texts = self.model.write(
            conversations, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=seed
        )
        raise_if_down(texts)
        return texts

    def _principle(self, row: Row, number: int) -> Principle:
        principles = self.constitution.principles
        order = random.Random(f"{self.seed}/{message_text(row['prompt'])}").sample(principles, len(principles))
        return order[number % len(order)]


def supervised_rows(rows: Sequence[Row]) -> list[Row]:
    """Return the revised completions as supervised rows: prompt, what its chat template was given, completion."""
    revised = [row for row in rows if row["outcome"] == "revised"]
    return [{"prompt": row["prompt"], **template_columns(row), "completion": row["completion"]} for row in revised]


def _row(rollout: Rollout) -> Row:
    text = rollout.completions[0].text
    return {
        "index": rollout.prompt.index,
        "prompt": prompt_json(rollout.prompt.text),
        **template_columns(rollout.prompt.columns),
        "answer": text,
        "completion": text,
        "critiques": [],
        "outcome": "revised" if text.strip() else "empty",
    }


def _is_written(text: str | Failure, row: Row) -> TypeGuard[str]:
    """Return whether a critique or a revision was written; if not, the row's outcome says why."""
    if isinstance(text, Failure):
        row["outcome"] = text.kind
    elif not text.strip():
        row["outcome"] = "empty"
    return row["outcome"] == "revised"
