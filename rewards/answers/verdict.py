"""Right or wrong: an expected answer against all that a completion says."""

from __future__ import annotations

from dataclasses import dataclass

from alignlab_rewards.answers.boxes import bound_kept, boxed
from alignlab_rewards.answers.columns import ExpectedAnswer
from alignlab_rewards.answers.comparison import same_answer
from alignlab_rewards.answers.extraction import Statement, stated_answer, statements
from alignlab_rewards.answers.forms import Answer
from alignlab_rewards.answers.markup import words
from alignlab_rewards.answers.reading import is_mathematics, read_answer
from alignlab_rewards.answers.symbolic import same_by_math_verify
from alignlab_rewards.answers.text import (
    are_letters,
    choice_of,
    ends_with_text,
    is_verdict,
    leading_verdict,
    only_choice,
    same_text,
)

# Values of a column of binary fractions are only as exact as these.
BINARY_TOLERANCE = 1e-12
_MAX_READINGS = 60


@dataclass(frozen=True)
class Expectation:
    """An expected answer, read.

    Attributes:
        text: the answer as text.
        whole: the whole text of the column.
        answer: what `text` says.
        choice: letter and content where it is a choice.
        relative_tolerance: of numbers.
    """

    text: str
    whole: str
    answer: Answer
    choice: tuple[str, str] | None
    relative_tolerance: float

    @classmethod
    def of(cls, gold: ExpectedAnswer, relative_tolerance: float) -> Expectation:
        """Read an expected answer: what stands in its last box, or what it states, or the whole of it."""
        text = boxed(gold.text) or stated_answer(gold.text) or bound_kept(gold.text)
        tolerance = max(relative_tolerance, BINARY_TOLERANCE) if gold.binary else relative_tolerance
        return cls(text, bound_kept(gold.whole), read_answer(text), choice_of(text), tolerance)

    @property
    def is_text(self) -> bool:
        """True where the answer is words, to be found as words."""
        return not is_mathematics(self.answer)


def is_right(expected: Expectation, said: str) -> bool:
    """Return True if the final answer of a text is the expected one."""
    short = len(said) <= 2 * len(expected.whole) + 100
    if short and words(bound_kept(said)) in (words(expected.whole), words(expected.text)):
        return True
    if is_verdict(expected.text):
        return _verdict_is(expected, said)
    for statement in statements(said):
        verdict = _judge_text(expected, statement) if expected.is_text else _judge(expected, statement)
        if verdict is False and expected.choice is not None and not statement.decisive:
            return only_choice(said) == expected.choice[0]
        if verdict is not None:
            return verdict
    return False


def _judge(expected: Expectation, statement: Statement) -> bool | None:
    """Compare mathematics with the first reading of a place that is mathematics; None where no reading is."""
    if any(reading.endswith("!") and same_text(expected.text, reading) for reading in statement.texts[:2]):
        return True
    # Letters such as "red" may be a product, and are a word at the end of a sentence.
    word = statement.prose and bool(statement.texts) and are_letters(expected.text)
    if word and ends_with_text(expected.text, statement.texts[0]):
        return True
    for reading in statement.texts[:_MAX_READINGS]:
        if same_text(expected.text, reading):
            return True
        if are_letters(expected.text, reading):
            return False
        choice = choice_of(reading)
        if expected.choice is not None and choice is not None:
            return expected.choice[0] == choice[0]
        # "A: 15" is a label and its answer, before it is a ratio.
        for text in [choice[1], reading] if choice is not None and choice[1] else [reading]:
            given = read_answer(text, prose=statement.prose)
            if is_mathematics(given):
                return same_answer(expected.answer, given, relative_tolerance=expected.relative_tolerance)
        if not statement.prose and same_by_math_verify(expected.text, reading):
            return True
    return False if statement.decisive else None


def _judge_text(expected: Expectation, statement: Statement) -> bool:
    """Compare words with every reading of a place, and with its end."""
    for reading in statement.texts[:_MAX_READINGS]:
        if same_text(expected.text, reading) or same_answer(expected.answer, read_answer(reading)):
            return True
        choice = choice_of(reading)
        if choice is not None:
            if expected.choice is not None:
                return expected.choice[0] == choice[0]
            if choice[1] and same_text(expected.text, choice[1]):
                return True
        if not statement.prose and same_by_math_verify(expected.text, reading):
            return True
    return bool(statement.texts) and statement.prose and ends_with_text(expected.text, statement.texts[0])


def _verdict_is(expected: Expectation, said: str) -> bool:
    """Compare yes, no, true or false with the last sentence that says one of them."""
    for statement in statements(said):
        for reading in statement.texts[:_MAX_READINGS]:
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
