"""Reward for a completion that is the answer and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignlab_rewards.answers.columns import ExpectedAnswer, expected_answer, in_digits
from alignlab_rewards.answers.options import check_switch
from alignlab_rewards.answers.votes import reads_answers

from alignlab.types import Text, message_text


def read_answer(completion: str, *, ignore_case: bool = False) -> str | None:
    """Return the whole text as votes count it: without white space around it; None for an empty one."""
    text = completion.strip()
    return (text.casefold() if ignore_case else text) or None


@reads_answers(read_answer)
def exact_match(
    *, completions: Sequence[Text], answer: Sequence[Any], ignore_case: bool = False, **columns: Any
) -> list[float | None]:
    """Return 1.0 where completion and answer are equal but for white space around them, else 0.0.

    Text is compared as text. Where the column holds numbers, digits of the same value are equal: `72` and 72.0. The
    answer of a text that ends with a line `#### 72`, as in GSM8K, is 72 or the whole text.

    Args:
        completions: strings or chat messages.
        answer: the dataset's column. The value is None where it is None, NaN or empty, which is logged once.
        ignore_case: compare without regard to case.
        columns: unused.
    """
    check_switch("exact_match", "ignore_case", ignore_case)
    return [
        _value(expected_answer(expected, reward="exact_match"), message_text(completion).strip(), ignore_case)
        for completion, expected in zip(completions, answer, strict=True)
    ]


def _value(expected: ExpectedAnswer | None, completion: str, ignore_case: bool) -> float | None:
    if expected is None:
        return None
    number = in_digits(expected.text) if expected.numeric else None
    if number is not None and number == in_digits(completion):
        return 1.0
    texts = [expected.text, expected.whole]
    if ignore_case:
        return float(completion.casefold() in [text.casefold() for text in texts])
    return float(completion in texts)
