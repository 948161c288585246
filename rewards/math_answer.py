"""Reward for a right final answer: numbers, mathematics, choices or words."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from alignlab_rewards.answers.columns import ExpectedAnswer, expected_answer
from alignlab_rewards.answers.extraction import statements
from alignlab_rewards.answers.forms import is_mathematics
from alignlab_rewards.answers.options import check_choice, check_number
from alignlab_rewards.answers.reading import read_answer as reading_of
from alignlab_rewards.answers.thinking import Thinking, after_thinking
from alignlab_rewards.answers.verdict import MAX_READINGS, Expectation, is_right
from alignlab_rewards.answers.votes import reads_answers

from alignlab.types import Text, message_text


def read_answer(completion: str, *, thinking: Thinking = "auto") -> str | None:
    """Return the first reading of a place that states an answer which is mathematics; where none is, the first of all.

    None where no place states an answer.
    """
    readings = [
        (reading, statement.prose)
        for statement in statements(after_thinking(completion, thinking) or "")
        for reading in statement.texts[:MAX_READINGS]
    ]
    formal = (text for text, prose in readings if is_mathematics(reading_of(text, prose=prose)))
    return next(formal, readings[0][0] if readings else None)


def same_answer(answer: str, other: str) -> bool:
    """Return True where the reward would take one answer as right with the other one expected."""
    gold = expected_answer(other, reward="math_answer")
    return answer == other or (gold is not None and is_right(_expectation(gold, 0.0), answer))


@reads_answers(read_answer, same_answer)
def math_answer(
    *,
    completions: Sequence[Text],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    thinking: Thinking = "auto",
    relative_tolerance: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    r"""Return 1.0 where the completion's final answer is the expected one, else 0.0.

    The final answer is the last `\boxed{}`, or the last ones that "and" or a comma joins; else the last `<answer>` tag,
    line `#### 72` or sentence such as "The answer is 72"; else the end, the emphasised part or the last number of the
    last sentence that has one, without checks and remarks behind it. "Wait, it should be 73" takes an answer back. Two
    answers, "11 or 12", are not one of them, nor is a bound such as "at least 72".

    Numbers are compared exactly (1/3 is not 0.33), expressions for all values of their variables, sets in any order,
    intervals with their brackets, words as words: "twelve" is not 12. Units and currencies must agree where both
    answers have them; percent may be written as `28%`, `28` or `0.28`. Every call takes bounded time: numbers too large
    to be written out are compared by their remainders, or only as they are written.

    Args:
        completions: strings or chat messages.
        answer: the dataset's column: a number, an expression, LaTeX, words, a list of several answers, or a text with a
            `\boxed{}` or a last line `#### 72` in it.
        solution: the same under TRL's name for the column; used for rows without an `answer`.
        thinking: the part of a thinking model's completion that may hold the answer. "auto": the text behind the last
            `</think>` (or the closing tag of another family); nothing if `<think>` is opened and never closed; all of
            a completion without tags. "required": the text behind the closing tag, and nothing without one, for chat
            templates that open the reasoning in the prompt. "keep": the whole completion.
        relative_tolerance: numbers that differ by no more than this fraction of the expected one are equal; 0 is exact.
        columns: unused.

    Returns:
        None where the expected answer is None, NaN or an empty text, which is logged once.
    """
    if answer is None and solution is None:
        raise ValueError("math_answer needs a column 'answer' or 'solution' in the dataset")
    check_choice("math_answer", "thinking", thinking, ("auto", "required", "keep"))
    check_number("math_answer", "relative_tolerance", relative_tolerance)
    if not 0 <= relative_tolerance < 1:
        raise ValueError(
            f"math_answer's relative_tolerance must be at least 0 and below 1, and is {relative_tolerance}"
        )
    absent = [None] * len(completions)
    answer_columns = (absent if column is None else column for column in (answer, solution))
    return [
        _value(_first_expected(entries), message_text(completion), thinking, relative_tolerance)
        for *entries, completion in zip(*answer_columns, completions, strict=True)
    ]


def _first_expected(entries: Sequence[Any]) -> ExpectedAnswer | None:
    """Return a row's expected answer, from the first of its columns that has one."""
    answers = (expected_answer(entry, reward="math_answer") for entry in entries)
    return next((answer for answer in answers if answer is not None), None)


def _value(gold: ExpectedAnswer | None, completion: str, thinking: Thinking, relative_tolerance: float) -> float | None:
    if gold is None:
        return None
    text = after_thinking(completion, thinking)
    return 0.0 if text is None else float(is_right(_expectation(gold, relative_tolerance), text))


@functools.lru_cache(maxsize=1024)
def _expectation(gold: ExpectedAnswer, relative_tolerance: float) -> Expectation:
    """Read an expected answer once for all completions of its group."""
    return Expectation.of(gold, relative_tolerance)
