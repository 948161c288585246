"""Decide whether the final answer of a completion is the expected one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from alignlab_rewards.answers.boxes import boxed, with_bound
from alignlab_rewards.answers.columns import ExpectedAnswer
from alignlab_rewards.answers.comparison import same_answer
from alignlab_rewards.answers.extraction import Statement, stated_answer, statements
from alignlab_rewards.answers.forms import Answer, is_mathematics
from alignlab_rewards.answers.markup import words
from alignlab_rewards.answers.reading import read_answer
from alignlab_rewards.answers.symbolic import same_by_math_verify
from alignlab_rewards.answers.text import (
    Choice,
    are_letters,
    choice_of,
    ends_with_text,
    is_verdict,
    leading_verdict,
    only_choice,
    same_text,
)

BINARY_TOLERANCE = 1e-12  # relative; a column of binary fractions is not more exact
MAX_READINGS = 60


@dataclass(frozen=True)
class Expectation:
    """An expected answer that was read once, for all completions of its group.

    Attributes:
        text: the answer as text.
        whole: the whole text of the column.
        answer: the form that `text` has.
        choice: the letter and content of a choice, `B. Paris`; else None.
        relative_tolerance: numbers that differ by at most this fraction are equal.
    """

    text: str
    whole: str
    answer: Answer
    choice: Choice | None
    relative_tolerance: float

    @classmethod
    def of(cls, gold: ExpectedAnswer, relative_tolerance: float) -> Expectation:
        """Read an expected answer: its last box, or its sentence "The answer is ...", or the whole of it."""
        text = boxed(gold.text) or stated_answer(gold.text) or with_bound(gold.text)
        tolerance = max(relative_tolerance, BINARY_TOLERANCE) if gold.binary else relative_tolerance
        return cls(text, with_bound(gold.whole), read_answer(text), choice_of(text), tolerance)

    @property
    def is_text(self) -> bool:
        """True where the answer is words."""
        return not is_mathematics(self.answer)


def is_right(expected: Expectation, completion: str) -> bool:
    """Return True if the final answer of a completion is the expected one.

    Args:
        expected: the expected answer.
        completion: the text behind the reasoning of a thinking model; see `thinking.after_thinking`.
    """
    is_short = len(completion) <= 2 * len(expected.whole) + 100
    if is_short and words(with_bound(completion)) in (words(expected.whole), words(expected.text)):
        return True
    if is_verdict(expected.text):
        return _states_verdict(expected, completion)
    judge = _judge_text if expected.is_text else _judge_mathematics
    for statement in statements(completion):
        verdict = judge(expected, statement)
        if verdict is False and expected.choice is not None and not statement.decisive:
            return only_choice(completion) == expected.choice.letter
        if verdict is not None:
            return verdict
    return False


def _judge_mathematics(expected: Expectation, statement: Statement) -> bool | None:
    """Compare with the first reading of a place that is mathematics; None where no reading is."""
    # "5!" is a factorial if one is expected, and else the end of a sentence.
    if any(reading.endswith("!") and same_text(expected.text, reading) for reading in statement.texts[:2]):
        return True
    # Letters such as "red" may be a product, and are a word at the end of a sentence.
    if are_letters(expected.text) and _ends_with(expected, statement):
        return True
    verdict = _first_verdict(_judge_reading, expected, statement)
    return False if verdict is None and statement.decisive else verdict


def _judge_reading(expected: Expectation, reading: str, prose: bool) -> bool | None:
    """Compare mathematics with one reading; None where the reading is no mathematics."""
    if same_text(expected.text, reading):
        return True
    if are_letters(expected.text, reading):
        return False
    choice = choice_of(reading)
    if expected.choice is not None and choice is not None:
        return expected.choice.letter == choice.letter
    # "A: 15" is a label and its answer, before it is a ratio.
    for text in [choice.content, reading] if choice is not None and choice.content else [reading]:
        answer = read_answer(text, prose=prose)
        if is_mathematics(answer):
            return same_answer(expected.answer, answer, relative_tolerance=expected.relative_tolerance)
    return _verified(expected, reading, prose)


def _judge_text(expected: Expectation, statement: Statement) -> bool:
    """Compare words with every reading of a place, and with its end."""
    verdict = _first_verdict(_judge_words, expected, statement)
    return _ends_with(expected, statement) if verdict is None else verdict


def _judge_words(expected: Expectation, reading: str, prose: bool) -> bool | None:
    """Compare words with one reading; None where the reading decides nothing."""
    if same_text(expected.text, reading) or same_answer(expected.answer, read_answer(reading)):
        return True
    choice = choice_of(reading)
    if choice is not None and expected.choice is not None:
        return expected.choice.letter == choice.letter
    if choice is not None and choice.content and same_text(expected.text, choice.content):
        return True
    return _verified(expected, reading, prose)


def _first_verdict(
    judge: Callable[[Expectation, str, bool], bool | None], expected: Expectation, statement: Statement
) -> bool | None:
    verdicts = (judge(expected, reading, statement.prose) for reading in statement.texts[:MAX_READINGS])
    return next((verdict for verdict in verdicts if verdict is not None), None)


def _verified(expected: Expectation, reading: str, prose: bool) -> bool | None:
    """Return True if math-verify finds a marked answer equal; else None, since it may not know the notation."""
    return True if not prose and same_by_math_verify(expected.text, reading) else None


def _ends_with(expected: Expectation, statement: Statement) -> bool:
    """Return True if a statement is a sentence that ends with the expected words."""
    return statement.prose and bool(statement.texts) and ends_with_text(expected.text, statement.texts[0])


def _states_verdict(expected: Expectation, completion: str) -> bool:
    """Compare yes, no, true or false with the last sentence that says one of them."""
    for statement in statements(completion):
        for reading in statement.texts[:MAX_READINGS]:
            if same_text(expected.text, reading):
                return True
            verdict = leading_verdict(reading)
            if verdict is not None:
                return verdict == words(expected.text).casefold()
        if statement.decisive:
            return False
        if statement.texts and ends_with_text(expected.text, statement.texts[0]):
            return True
    return False
