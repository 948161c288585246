"""The judge: how likely one completion is better than another, and how good one is, by a constitution.

Each pair is shown in both orders, and the two answers are averaged, which cancels a preference for a position (Lee et
al. 2023, arXiv:2309.00267, Sec. 2.1). A question without an answer is asked again, counted and, in the end, None.
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Protocol

from alignlab.config.constitution import Constitution, Principle
from alignlab.config.judge import PromptedSettings
from alignlab.rlaif import questions
from alignlab.rlaif.answers import AnswerStore, answer_key
from alignlab.rlaif.chat_model import ChatModel, Conversation, Failure, refuse_silence
from alignlab.types import Text

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Verdict:
    """What a judge makes of a pair.

    Attributes:
        probability: that the first completion is the better one; None where no question about it was answered.
        by_order: the same, of each judgement: as the pair was shown first, and as it was shown second; None where an
            order has no answer, and then the judgement does not count.
        counts: of the questions about this pair, as the judge's; a question about two pairs of one call is the first's.
    """

    probability: float | None
    by_order: tuple[tuple[float | None, float | None], ...] = ()
    counts: Mapping[str, int] = field(default_factory=dict, compare=False)


class Judge(Protocol):
    """What prefers and rates. `counts` is of questions since this start, by what became of them."""

    counts: Counter[str]

    def compare(self, pairs: Sequence[tuple[Text, str, str]]) -> list[Verdict]:
        """A verdict on each (prompt, first completion, second completion)."""
        ...

    def rate(self, answers: Sequence[tuple[Text, str]]) -> list[float | None]:
        """How good each (prompt, completion) is, in [0, 1]; None without an answer."""
        ...


@dataclass(frozen=True)
class _Question:
    """One conversation with its choices; `vote` tells samples of the same question apart, `work` is asked for."""

    conversation: Conversation
    choices: tuple[str, ...]
    vote: int
    work: str


@dataclass
class PromptedJudge:
    """A chat model asked by a constitution.

    Callers may name the work that they ask for. An answer on disk that was asked for the same work, by a process that
    was killed before it had kept what it made of it, counts as asked now: counts are as if nothing had been.

    Attributes:
        model: what is asked.
        constitution: by which.
        settings: how.
        store: answers on disk; None keeps none.
        seed: of the choice of principles, and of sampled answers.
        counts: of questions since this start: asked (attempts), cached, answered, unanswered, over_budget, and by
            `FailureKind`; and of requests that were sent once more: retried.
        earlier: counts of what earlier starts have kept, for the budget; see `take_earlier`.
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
        """Questions asked, by this start and by earlier ones."""
        return self.counts["asked"] + self.earlier["asked"]

    def compare(self, pairs: Sequence[tuple[Text, str, str]], *, work: Sequence[str] = ()) -> list[Verdict]:
        """`votes` judgements of each pair, in both orders.

        Args:
            work: names, one a pair, of what the verdict is for; each is asked for in one call of a process.
        """
        asked, reason = [], self.settings.answers == "sampled"
        for (prompt, first, second), name in zip(pairs, work or [""] * len(pairs), strict=True):
            for vote, principle in enumerate(self._principles(f"{prompt}{min(first, second)}{max(first, second)}")):
                for one, other in ((first, second), (second, first)):
                    told = questions.comparison(self.constitution, principle, prompt, one, other, reason=reason)
                    asked.append(_Question(told, questions.FIRST_OR_SECOND, vote, name))
        found, tallies = self._answers(asked)
        answers, counted = iter(found), iter(tallies)
        verdicts = []
        for _ in pairs:
            both = tuple((_first(next(answers)), _second(next(answers))) for _ in range(self.settings.votes))
            counts = sum((next(counted) for _ in range(2 * self.settings.votes)), Counter[str]())
            means = [fmean((one, other)) for one, other in both if one is not None and other is not None]
            verdicts.append(Verdict(settled(fmean(means)) if means else None, both, dict(counts)))
        return verdicts

    def rate(self, answers: Sequence[tuple[Text, str]], *, work: Sequence[str] = ()) -> list[float | None]:
        """The expected rating, brought to [0, 1], averaged over `votes` judgements; `work` is as for `compare`.

            rating = (sum_r r p(r) - 1) / (max_rating - 1)

        Reference: Lee et al. (2023), arXiv:2309.00267, Sec. 2.2.2 (direct RLAIF).
        """
        top, reason = self.settings.max_rating, self.settings.answers == "sampled"
        choices = questions.ratings(top)
        asked = []
        for (prompt, text), name in zip(answers, work or [""] * len(answers), strict=True):
            for vote, principle in enumerate(self._principles(f"{prompt}{text}")):
                told = questions.rating(self.constitution, principle, prompt, text, max_rating=top, reason=reason)
                asked.append(_Question(told, choices, vote, name))
        found = iter(self._answers(asked)[0])
        rated = []
        for _ in answers:
            votes = [next(found) for _ in range(self.settings.votes)]
            values = [expected_rating(probabilities) for probabilities in votes if probabilities is not None]
            rated.append(fmean(values) if values else None)
        return rated

    def _principles(self, about: str) -> list[Principle]:
        """One principle a vote, drawn without replacement while there are some left; the same for the same pair."""
        known = self.constitution.principles
        draw = random.Random(f"{self.seed}/{about}")
        drawn: list[Principle] = []
        while len(drawn) < self.settings.votes:
            drawn += draw.sample(known, min(len(known), self.settings.votes - len(drawn)))
        return drawn

    @property
    def _num_attempts(self) -> int:
        """A probability is what it is: only a sampled answer that is nonsense may be another the next time."""
        return self.settings.max_attempts if self.settings.answers == "sampled" else 1

    def _answers(self, asked: Sequence[_Question]) -> tuple[list[list[float] | None], list[Counter[str]]]:
        """Probabilities of the choices of each question, as kept or asked now (None without one), and its counts."""
        keys = [self._key(question) for question in asked]
        wanted = {key: question for key, question in zip(reversed(keys), reversed(asked), strict=True)}  # the first's
        wanted = {key: wanted[key] for key in keys}
        tallies: defaultdict[str, Counter[str]] = defaultdict(Counter)
        known = self.store.get(list(wanted)) if self.store is not None else {}
        own = self._count_own({key: wanted[key] for key in known}, tallies)
        self._count("cached", known.keys() - own, tallies)
        left = {key: question for key, question in wanted.items() if key not in known}
        for attempt in range(self._num_attempts):
            found = self._ask(left, attempt, tallies)
            known |= _told(found)
            if not known:
                refuse_silence(list(found.values()))
            left = {key: left[key] for key, answer in found.items() if _is_nonsense(answer)}
        self._count("unanswered", [key for key in keys if key not in known], tallies)
        counts = [tallies.pop(key, Counter()) for key in keys]
        repeated = [key for key, count in Counter(keys).items() for _ in range(count - 1) if key in known]
        self.counts["cached"] += len(repeated)
        return [known.get(key) for key in keys], [
            count or Counter(cached=int(key in known)) for key, count in zip(keys, counts, strict=True)
        ]

    def _count_own(self, found: Mapping[str, _Question], tallies: Mapping[str, Counter[str]]) -> set[str]:
        """Count what was asked for the same work before, as it was then, and return which those are."""
        named = [key for key, question in found.items() if question.work]
        told = self.store.work(named) if self.store is not None and named else {}
        own = {key: attempts for key, (work, attempts) in told.items() if work == found[key].work}
        for key, attempts in own.items():
            self._count("asked", [key] * attempts, tallies)
            self._count("nonsense", [key] * (attempts - 1), tallies)
        self._count("answered", own, tallies)
        return set(own)

    def _count(self, name: str, keys: Collection[str], tallies: Mapping[str, Counter[str]]) -> None:
        self.counts[name] += len(keys)
        for key in keys:
            tallies[key][name] += 1

    def _ask(
        self, left: dict[str, _Question], attempt: int, tallies: Mapping[str, Counter[str]]
    ) -> dict[str, list[float] | Failure]:
        """What becomes of the questions that the budget leaves room for; answers are kept."""
        limit = self.settings.max_questions
        room = len(left) if limit is None else max(0, limit - self.num_asked)
        now = dict(list(left.items())[:room])
        self._count("over_budget", left.keys() - now.keys(), tallies)
        if not now:
            return {}
        self._count("asked", now, tallies)
        before = self.model.num_retries
        found = dict(zip(now, self._read(list(now.values()), attempt), strict=True))
        self.counts["retried"] += self.model.num_retries - before
        answered = _told(found)
        self._count("answered", answered, tallies)
        for key, answer in found.items():
            if isinstance(answer, Failure):
                self._count(answer.kind, [key], tallies)
        if self.store is not None:
            work = {key: now[key].work for key in answered if now[key].work}
            self.store.put(answered, work=work, attempts=attempt + 1)
        return found

    def _read(self, asked: Sequence[_Question], attempt: int) -> list[list[float] | Failure]:
        """Probabilities of the choices: the model's, or 1 for the one that a sampled answer ends with."""
        if self.settings.answers == "probabilities":
            return self._read_probabilities(asked)
        found: list[list[float] | Failure] = [Failure("nonsense", "")] * len(asked)
        for vote in sorted({question.vote for question in asked}):
            places = [i for i, question in enumerate(asked) if question.vote == vote]
            texts = self.model.write(
                [asked[i].conversation for i in places],
                max_new_tokens=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
                seed=random.Random(f"{self.seed}/{vote}/{attempt}").getrandbits(31),
            )
            for i, text in zip(places, texts, strict=True):
                found[i] = text if isinstance(text, Failure) else _vote(text, asked[i].choices)
        return found

    def _read_probabilities(self, asked: Sequence[_Question]) -> list[list[float] | Failure]:
        assert len({question.choices for question in asked}) == 1
        told = self.model.choose([question.conversation for question in asked], asked[0].choices)
        return [answer if isinstance(answer, Failure) else normalised(answer) for answer in told]

    def _key(self, question: _Question) -> str:
        sampled = self.settings.answers == "sampled"
        how = [question.vote, self.seed, self.settings.temperature, self.settings.max_new_tokens] if sampled else []
        return answer_key(
            model=self.model.identity, conversation=list(question.conversation), choices=question.choices, how=how
        )


def take_earlier(judge: Judge, kept: Mapping[str, int]) -> None:
    """Let what earlier starts have kept count for the budget too, where the judge has one.

    Args:
        kept: counts of all that is kept, by this start and by earlier ones.
    """
    if isinstance(judge, PromptedJudge):
        judge.earlier.clear()
        judge.earlier.update(Counter(kept) - judge.counts)


def _told(answers: Mapping[str, list[float] | Failure]) -> dict[str, list[float]]:
    """Those that are no failures."""
    return {key: answer for key, answer in answers.items() if not isinstance(answer, Failure)}


def _is_nonsense(answer: list[float] | Failure) -> bool:
    return isinstance(answer, Failure) and answer.kind == "nonsense"


def settled(probability: float) -> float:
    """One half where it differs by rounding alone: a judge of equal answers, or of positions, prefers none."""
    return 0.5 if abs(probability - 0.5) < _ROUNDING else probability


def normalised(logprobs: Sequence[float]) -> list[float]:
    """Probabilities of choices among themselves, from their log-probabilities."""
    top = max(logprobs)
    weights = [math.exp(logprob - top) for logprob in logprobs]
    return [weight / sum(weights) for weight in weights]


def expected_rating(probabilities: Sequence[float]) -> float:
    """The mean of ratings 1..R of these probabilities, brought to [0, 1]."""
    return sum(i * p for i, p in enumerate(probabilities)) / (len(probabilities) - 1)


def _first(probabilities: Sequence[float] | None) -> float | None:
    return None if probabilities is None else probabilities[0]


def _second(probabilities: Sequence[float] | None) -> float | None:
    return None if probabilities is None else probabilities[1]


def _vote(text: str, choices: Sequence[str]) -> list[float] | Failure:
    place = questions.chosen(text, choices)
    if place is None:
        return Failure("nonsense", f"none of {', '.join(choices)} stands in {text[-80:]!r}")
    return [float(i == place) for i in range(len(choices))]
