"""Judges: how probably one completion is better than another, and how good one is, by a constitution.

Each pair is shown in both orders, and the two answers are averaged, which cancels a preference for a position (Lee et
al. 2023, arXiv:2309.00267, Sec. 2.1). A question without an answer is asked again, counted and, in the end, None.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import fmean
from typing import Protocol

from alignlab.config.judge import Constitution, Principle, PromptedSettings
from alignlab.scoring.judges import questions
from alignlab.scoring.judges.answer_cache import AnswerStore
from alignlab.scoring.judges.asking import Answer, Question, QuestionBatch
from alignlab.scoring.judges.chat_model import ChatModel
from alignlab.types import Text

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Verdict:
    """A judge's opinion on a pair of completions.

    Attributes:
        probability: probability that the first completion is the better one; None where no judgement has an answer in
            both orders.
        by_order: the same probability in each judgement: with the first completion shown first, and shown second; None
            where there is no answer. A judgement with an order of None is left out of `probability`.
        counts: questions about this pair, by outcome; a question about two pairs of one call belongs to the first pair.
    """

    probability: float | None
    by_order: tuple[tuple[float | None, float | None], ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict, compare=False)


class Judge(Protocol):
    """Compares and rates completions.

    Attributes:
        counts: questions since this start, by outcome.
    """

    counts: Counter[str]

    def compare(self, pairs: Sequence[tuple[Text, str, str]]) -> list[Verdict]:
        """Return a verdict on each (prompt, first completion, second completion)."""
        ...

    def rate(self, answers: Sequence[tuple[Text, str]]) -> list[float | None]:
        """Return how good each (prompt, completion) is, in [0, 1]; None without an answer."""
        ...


@dataclass
class PromptedJudge:
    """A chat model that is asked by a constitution.

    A caller may name the work that a verdict is for, such as a run and a row. A process that is killed may have answers
    on the disk whose verdicts it has not kept. An answer that was asked for the same work then counts as asked rather
    than cached, so that a killed and resumed run counts the same questions as one that was not killed.

    Attributes:
        model: the model that is asked.
        constitution: the principles that the questions quote.
        settings: how the model is asked.
        store: answers on the disk; None keeps none.
        seed: seed of the choice of principles and of sampled answers.
        counts: questions since this start: asked (every attempt), cached, answered, unanswered, over_budget and, by
            `FailureKind`, failed; and retried, the requests that were sent once more.
        earlier: counts of earlier starts, for the budget; see `count_earlier_questions`.
    """

    model: ChatModel
    constitution: Constitution
    settings: PromptedSettings
    store: AnswerStore | None = None
    seed: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    earlier: Counter[str] = field(default_factory=Counter)

    @property
    def num_asked(self) -> int:
        """Questions asked, in this start and in earlier ones."""
        return self.counts["asked"] + self.earlier["asked"]

    def compare(self, pairs: Sequence[tuple[Text, str, str]], *, work: Sequence[str] = ()) -> list[Verdict]:
        """Return verdicts of `votes` judgements of each pair, each judgement in both orders.

        Args:
            pairs: (prompt, first completion, second completion).
            work: name of the work of each pair; a process names each work in one call only.
        """
        names = work or [""] * len(pairs)
        groups = [list(self._comparisons(*pair, name)) for pair, name in zip(pairs, names, strict=True)]
        return [_verdict(answers) for answers in self._ask(groups)]

    def rate(self, answers: Sequence[tuple[Text, str]], *, work: Sequence[str] = ()) -> list[float | None]:
        """Return the expected rating of each completion, scaled to [0, 1], averaged over `votes` judgements.

            rating = (sum_r r p(r) - 1) / (max_rating - 1)

        Args:
            answers: (prompt, completion).
            work: see `compare`.

        Reference: Lee et al. (2023), arXiv:2309.00267, Sec. 2.2.2 (direct RLAIF).
        """
        names = work or [""] * len(answers)
        groups = [list(self._ratings(*answer, name)) for answer, name in zip(answers, names, strict=True)]
        return [_mean_rating(votes) for votes in self._ask(groups)]

    def _comparisons(self, prompt: Text, first: str, second: str, work: str) -> Iterator[Question]:
        """Yield, for each vote, the question with the first completion shown first, then with it shown second."""
        with_reason = self.settings.answers == "sampled"
        # The same principles in both orders of a pair, so that the pair swapped asks the same questions.
        principles = self._principles(f"{prompt}{min(first, second)}{max(first, second)}")
        for vote, principle in enumerate(principles):
            for shown_first, shown_second in ((first, second), (second, first)):
                conversation = questions.comparison(
                    self.constitution, principle, prompt, shown_first, shown_second, reason=with_reason
                )
                yield Question(conversation, questions.FIRST_OR_SECOND, vote, work)

    def _ratings(self, prompt: Text, completion: str, work: str) -> Iterator[Question]:
        """Yield one question a vote."""
        max_rating, with_reason = self.settings.max_rating, self.settings.answers == "sampled"
        for vote, principle in enumerate(self._principles(f"{prompt}{completion}")):
            conversation = questions.rating(
                self.constitution, principle, prompt, completion, max_rating=max_rating, reason=with_reason
            )
            yield Question(conversation, questions.ratings(max_rating), vote, work)

    def _principles(self, about: str) -> list[Principle]:
        """Return one principle a vote, drawn without replacement until all are drawn; the same for the same text."""
        principles = self.constitution.principles
        draw = random.Random(f"{self.seed}/{about}")
        drawn: list[Principle] = []
        while len(drawn) < self.settings.votes:
            drawn += draw.sample(principles, min(len(principles), self.settings.votes - len(drawn)))
        return drawn

    def _ask(self, groups: Sequence[Sequence[Question]]) -> list[list[Answer]]:
        """Ask the questions of all groups together, and return the answers of each group in the same order."""
        batch = QuestionBatch(
            self.model, self.settings, self.seed, self.store, self.counts, num_earlier=self.earlier["asked"]
        )
        answers = batch.ask([question for group in groups for question in group])
        ends = accumulate(len(group) for group in groups)
        return [answers[end - len(group) : end] for group, end in zip(groups, ends, strict=True)]


def count_earlier_questions(judge: Judge, counts: Mapping[str, int]) -> None:
    """Let the questions of earlier starts count for the budget too, where the judge has one.

    Args:
        judge: the judge.
        counts: questions whose answers are kept, of this start and of earlier ones.
    """
    if isinstance(judge, PromptedJudge):
        judge.earlier.clear()
        judge.earlier.update(Counter(counts) - judge.counts)


def settled(probability: float) -> float:
    """Return one half for a probability that differs from one half by rounding alone, and any other as it is."""
    return 0.5 if abs(probability - 0.5) < _ROUNDING else probability


def expected_rating(probabilities: Sequence[float]) -> float:
    """Return the mean of the ratings 1..R under these probabilities, scaled to [0, 1]."""
    return sum(i * p for i, p in enumerate(probabilities)) / (len(probabilities) - 1)


def _verdict(answers: Sequence[Answer]) -> Verdict:
    """Return the verdict on a pair from its answers, which alternate between the two orders."""
    orders = [
        (_probability(shown_first, 0), _probability(shown_second, 1))
        for shown_first, shown_second in zip(answers[0::2], answers[1::2], strict=True)
    ]
    judgements = [(p + q) / 2 for p, q in orders if p is not None and q is not None]
    counts = sum((answer.counts for answer in answers), Counter[str]())
    return Verdict(settled(fmean(judgements)) if judgements else None, tuple(orders), dict(counts))


def _probability(answer: Answer, choice: int) -> float | None:
    return None if answer.probabilities is None else answer.probabilities[choice]


def _mean_rating(answers: Sequence[Answer]) -> float | None:
    ratings = [expected_rating(answer.probabilities) for answer in answers if answer.probabilities is not None]
    return fmean(ratings) if ratings else None
