"""1 where the completion's final answer is the expected one: numbers as numbers, mathematics as such, text as text."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from alignlab_rewards.answers.columns import ExpectedAnswer, expected_answer
from alignlab_rewards.answers.extraction import Thinking, after_thinking
from alignlab_rewards.answers.options import check_choice, check_number
from alignlab_rewards.answers.verdict import Expectation, is_right

from alignlab.types import Text, message_text


def math_answer(
    *,
    completions: Sequence[Text],
    answer: Sequence[Any] | None = None,
    solution: Sequence[Any] | None = None,
    thinking: Thinking = "auto",
    relative_tolerance: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    r"""1.0 where the completion's final answer is the expected one, else 0.0.

    The final answer is the last `\boxed{}`, or the last ones where "and" or a comma joins them; else what an `<answer>`
    tag, a line `#### 72` or a sentence such as "The answer is 72" says last; else the end, the emphasised part or the
    last number of the last sentence that has one, checks and remarks behind it aside. "Wait, it should be 73" takes an
    answer back. Two answers, "11 or 12", are not one of them, nor is a bound such as "at least 72". Numbers are
    compared exactly (1/3 is not 0.33), expressions for all values of their variables, sets in any order, intervals with
    their brackets, words as words, a number in words as the number. Units and currencies must agree where both answers
    have them; percent may be written as `28%`, `28` or `0.28`. Every call takes bounded time: numbers too large to be
    written out are compared by their remainders, or only as they are written.

    Args:
        completions: strings or chat messages.
        answer: the dataset's column: a number, an expression, LaTeX, words, a list of several answers, or a text with a
            `\boxed{}` or a last line `#### 72` in it.
        solution: the same under TRL's name for the column; used for rows without an `answer`.
        thinking: how the reasoning of thinking models is told from their answer. "auto": only what follows the last
            `</think>` (or the closing tag of another family) counts; a completion that opens `<think>` and never closes
            it has no answer; one without tags counts whole. "required": the same, and a completion without a closing
            tag has no answer, for chat templates that open the reasoning in the prompt. "keep": all of it counts.
        relative_tolerance: numbers that differ by no more than this fraction of the expected one are equal; 0 is exact.
        columns: unused.

    Returns:
        None where there is no expected answer: None, NaN or an empty text, which the log says once.
    """
    if answer is None and solution is None:
        raise ValueError("math_answer needs a column 'answer' or 'solution' in the dataset")
    check_choice("math_answer", "thinking", thinking, ("auto", "required", "keep"))
    check_number("math_answer", "relative_tolerance", relative_tolerance)
    if not 0 <= relative_tolerance < 1:
        raise ValueError(
            f"math_answer's relative_tolerance must be at least 0 and below 1, and is {relative_tolerance}"
        )
    nothing = [None] * len(completions)
    columns_of_answers = (nothing if column is None else column for column in (answer, solution))
    return [
        _value(_first_expected(golds), message_text(completion), thinking, relative_tolerance)
        for *golds, completion in zip(*columns_of_answers, completions, strict=True)
    ]


def _first_expected(golds: Sequence[Any]) -> ExpectedAnswer | None:
    """Return a row's expected answer, of the first of its columns that has one."""
    read = (expected_answer(gold, reward="math_answer") for gold in golds)
    return next((gold for gold in read if gold is not None), None)


def _value(gold: ExpectedAnswer | None, completion: str, thinking: Thinking, relative_tolerance: float) -> float | None:
    if gold is None:
        return None
    said = after_thinking(completion, thinking)
    return 0.0 if said is None else float(is_right(_expectation(gold, relative_tolerance), said))


@functools.lru_cache(maxsize=1024)
def _expectation(gold: ExpectedAnswer, relative_tolerance: float) -> Expectation:
    """Read an expected answer once for all completions of its group."""
    return Expectation.of(gold, relative_tolerance)
