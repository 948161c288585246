"""1 where the completion is the answer and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignlab.types import Text, message_text


def exact_match(
    *, completions: Sequence[Text], answer: Sequence[Any], ignore_case: bool = False, **columns: Any
) -> list[float | None]:
    """1.0 where completion and answer are equal but for white space around them, else 0.0.

    Args:
        completions: strings or chat messages.
        answer: the dataset's column; the reward does not apply where it is None.
        ignore_case: compare without regard to case.
        columns: unused.
    """

    def norm(text: str) -> str:
        return text.strip().casefold() if ignore_case else text.strip()

    return [
        None if expected is None else float(norm(message_text(completion)) == norm(str(expected)))
        for completion, expected in zip(completions, answer, strict=True)
    ]
