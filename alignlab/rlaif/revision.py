"""Critique and revision: a completion is criticised by a principle and written anew; the last version is taught.

Bai et al. (2022), Constitutional AI, arXiv:2212.08073, Sec. 3.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from alignlab.config.constitution import Constitution
from alignlab.data.messages import template_columns
from alignlab.rlaif import questions
from alignlab.rlaif.chat_model import ChatModel, Failure, refuse_silence
from alignlab.rlaif.collecting import as_json
from alignlab.types import Rollout, message_text


class Reviser:
    """Criticises and revises completions.

    Args:
        model: writes critiques and revisions.
        constitution: whose principles are drawn for each prompt, without replacement while there are some left.
        num_revisions: of each completion, >= 1.
        max_new_tokens, temperature: of a critique and of a revision.
        seed: of principles and texts.
    """

    def __init__(
        self, model: ChatModel, constitution: Constitution, *, num_revisions: int, max_new_tokens: int,
        temperature: float, seed: int,
    ) -> None:
        self.model, self.constitution = model, constitution
        self.num_revisions, self.seed = num_revisions, seed
        self.max_new_tokens, self.temperature = max_new_tokens, temperature

    def revise(self, rollouts: Sequence[Rollout]) -> list[dict[str, Any]]:
        """A row for the first completion of each prompt.

        Raises:
            JudgeError: the critic answers nothing at all.

        Returns:
            Rows with index, prompt, answer, critiques, completion (the last revision; None where a text was not
            written), and outcome: revised, empty (an empty text was), or the kind of a failure.
        """
        rows: list[dict[str, Any]] = [
            {
                "index": rollout.prompt.index,
                "prompt": as_json(rollout.prompt.text),
                **template_columns(rollout.prompt.columns),
                "answer": rollout.completions[0].text,
                "completion": rollout.completions[0].text,
                "critiques": [],
                "outcome": "revised" if rollout.completions[0].text.strip() else "empty",
            }
            for rollout in rollouts
        ]
        for round_number in range(self.num_revisions):
            self._round([row for row in rows if row["outcome"] == "revised"], round_number)
        for row in rows:
            if row["outcome"] != "revised":
                row["completion"] = None
        return rows

    def _round(self, rows: Sequence[dict[str, Any]], number: int) -> None:
        """One critique and one revision of each row."""
        principles = [self._principle(row, number) for row in rows]
        asked = [
            questions.critique(self.constitution, principle, row["prompt"], row["completion"])
            for row, principle in zip(rows, principles, strict=True)
        ]
        for row, remarks in zip(rows, self._write(asked, 2 * number), strict=True):
            _take(row, remarks, "critiques")
        left = [each for each in zip(rows, principles, strict=True) if each[0]["outcome"] == "revised"]
        asked = [
            questions.revision(self.constitution, principle, row["prompt"], row["completion"], row["critiques"][-1])
            for row, principle in left
        ]
        for (row, _), text in zip(left, self._write(asked, 2 * number + 1), strict=True):
            _take(row, text, "completion")

    def _write(self, conversations: Sequence[Any], turn: int) -> list[str | Failure]:
        if not conversations:
            return []
        seed = random.Random(f"{self.seed}/{turn}").getrandbits(31)
        written = self.model.write(
            conversations, max_new_tokens=self.max_new_tokens, temperature=self.temperature, seed=seed
        )
        refuse_silence(written)
        return written

    def _principle(self, row: dict[str, Any], number: int) -> Any:
        known = self.constitution.principles
        order = random.Random(f"{self.seed}/{message_text(row['prompt'])}").sample(known, len(known))
        return order[number % len(order)]


def taught_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The revised completions, as supervised rows: prompt, completion, and what the prompt's template was given."""
    revised = [row for row in rows if row["outcome"] == "revised"]
    return [{"prompt": row["prompt"], **template_columns(row), "completion": row["completion"]} for row in revised]


def _take(row: dict[str, Any], text: str | Failure, field: str) -> None:
    if isinstance(text, Failure):
        row["outcome"] = text.kind
    elif not text.strip():
        row["outcome"] = "empty"
    elif field == "critiques":
        row["critiques"].append(text.strip())
    else:
        row["completion"] = text.strip()
