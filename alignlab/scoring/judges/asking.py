"""Questions to a judge's model: looked up on the disk, asked within a budget, again after nonsense, and counted."""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from alignlab.config.judge import PromptedSettings
from alignlab.scoring.judges import questions
from alignlab.scoring.judges.answer_cache import AnswerStore, answer_key
from alignlab.scoring.judges.chat_model import ChatModel, Conversation, Failure, raise_if_down

Outcome = list[float] | Failure
"""Probabilities of the choices, or why there are none."""


@dataclass(frozen=True)
class Question:
    """A conversation that the judge answers with one of some choices.

    Attributes:
        conversation: the messages.
        choices: the possible answers.
        vote: number of the vote; sampled answers of the same conversation differ by it.
        work: name of what the answer is for; see `PromptedJudge`.
    """

    conversation: Conversation
    choices: tuple[str, ...]
    vote: int
    work: str


@dataclass(frozen=True)
class Answer:
    """The answer to a question.

    Attributes:
        probabilities: of the choices; None without an answer.
        counts: the question's share of the judge's counts.
    """

    probabilities: list[float] | None
    counts: Counter[str]


@dataclass
class QuestionBatch:
    """The questions of one call of a judge; a question that is repeated within the batch is asked once.

    Attributes:
        model: the model that is asked.
        settings: the judge's settings.
        seed: seed of sampled answers.
        store: answers on the disk; None keeps none.
        counts: the judge's counts, which are updated.
        num_earlier: questions that earlier starts of the run have asked, for the budget.
    """

    model: ChatModel
    settings: PromptedSettings
    seed: int
    store: AnswerStore | None
    counts: Counter[str]
    num_earlier: int
    _tallies: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def ask(self, batch: Sequence[Question]) -> list[Answer]:
        """Return an answer to each question, in the order of the questions.

        Raises:
            JudgeError: the model answers nothing at all.
        """
        keys = [self._key(question) for question in batch]
        distinct: dict[str, Question] = {}
        for key, question in zip(keys, batch, strict=True):
            distinct.setdefault(key, question)
        answers = self._stored_answers(distinct)
        missing = {key: question for key, question in distinct.items() if key not in answers}
        answers |= self._new_answers(missing, has_stored=bool(answers))
        self._count("unanswered", distinct.keys() - answers.keys())
        return self._in_order(keys, answers)

    def _in_order(self, keys: Sequence[str], answers: Mapping[str, list[float]]) -> list[Answer]:
        """Return an answer for each key; a repeated key counts as cached."""
        ordered: list[Answer] = []
        counted: set[str] = set()
        for key in keys:
            tally = self._tallies[key]
            if key in counted:
                tally = Counter({"cached" if key in answers else "unanswered": 1})
                self.counts.update(tally)
            counted.add(key)
            ordered.append(Answer(answers.get(key), tally))
        return ordered

    def _key(self, question: Question) -> str:
        """Return the key of a question's answer on the disk: a digest of all that the answer depends on."""
        settings = self.settings
        is_sampled = settings.answers == "sampled"
        sampling = [question.vote, self.seed, settings.temperature, settings.max_new_tokens] if is_sampled else []
        return answer_key(
            model=self.model.identity, conversation=list(question.conversation), choices=question.choices, how=sampling
        )

    def _stored_answers(self, batch: Mapping[str, Question]) -> dict[str, list[float]]:
        """Return the answers on the disk.

        An answer that was asked for the same work counts as asked now: a process that was killed before it had kept its
        product has asked for it.
        """
        if self.store is None:
            self._count("cached", ())
            return {}
        answers = self.store.get(list(batch))
        named = [key for key in answers if batch[key].work]
        attempts_of_work = self.store.work(named) if named else {}
        same_work = {key: attempts for key, (work, attempts) in attempts_of_work.items() if work == batch[key].work}
        for key, attempts in same_work.items():
            self._count("asked", [key] * attempts)
            self._count("nonsense", [key] * (attempts - 1))
        self._count("answered", same_work)
        self._count("cached", answers.keys() - same_work.keys())
        return answers

    def _new_answers(self, batch: Mapping[str, Question], *, has_stored: bool) -> dict[str, list[float]]:
        """Return the model's answers; only a sampled answer that is nonsense may differ when it is asked for again."""
        answers: dict[str, list[float]] = {}
        pending = dict(batch)
        for attempt in range(self.settings.max_attempts if self.settings.answers == "sampled" else 1):
            outcomes = self._attempt(pending, attempt)
            answers |= _probabilities(outcomes)
            if not answers and not has_stored:
                raise_if_down(list(outcomes.values()))
            pending = {key: pending[key] for key, outcome in outcomes.items() if _is_nonsense(outcome)}
        return answers

    def _attempt(self, pending: Mapping[str, Question], attempt: int) -> dict[str, Outcome]:
        """Ask the model the questions that the budget allows, and store the answers."""
        limit = self.settings.max_questions
        num_asked = self.counts["asked"] + self.num_earlier
        num_allowed = len(pending) if limit is None else max(0, limit - num_asked)
        allowed = dict(list(pending.items())[:num_allowed])
        self._count("over_budget", pending.keys() - allowed.keys())
        if not allowed:
            return {}
        self._count("asked", allowed)
        retries_before = self.model.num_retries
        outcomes = self._sample(allowed, attempt) if self.settings.answers == "sampled" else self._choose(allowed)
        self.counts["retried"] += self.model.num_retries - retries_before
        answers = _probabilities(outcomes)
        self._count("answered", answers)
        for key, outcome in outcomes.items():
            if isinstance(outcome, Failure):
                self._count(outcome.kind, [key])
        if self.store is not None:
            work = {key: allowed[key].work for key in answers if allowed[key].work}
            self.store.put(answers, work=work, attempts=attempt + 1)
        return outcomes

    def _choose(self, batch: Mapping[str, Question]) -> dict[str, Outcome]:
        """Return the model's probabilities of the choices."""
        [choices] = {question.choices for question in batch.values()}
        logprobs = self.model.choose([question.conversation for question in batch.values()], choices)
        return {
            key: answer if isinstance(answer, Failure) else normalised(answer)
            for key, answer in zip(batch, logprobs, strict=True)
        }

    def _sample(self, batch: Mapping[str, Question], attempt: int) -> dict[str, Outcome]:
        """Return probability 1 for the choice that a sampled text ends with."""
        outcomes: dict[str, Outcome] = {}
        for vote in sorted({question.vote for question in batch.values()}):
            of_vote = {key: question for key, question in batch.items() if question.vote == vote}
            texts = self.model.write(
                [question.conversation for question in of_vote.values()],
                max_new_tokens=self.settings.max_new_tokens,
                temperature=self.settings.temperature,
                seed=random.Random(f"{self.seed}/{vote}/{attempt}").getrandbits(31),
            )
            for (key, question), text in zip(of_vote.items(), texts, strict=True):
                outcomes[key] = text if isinstance(text, Failure) else _choice(text, question.choices)
        return {key: outcomes[key] for key in batch}

    def _count(self, name: str, keys: Collection[str]) -> None:
        self.counts[name] += len(keys)
        for key in keys:
            self._tallies[key][name] += 1


def normalised(logprobs: Sequence[float]) -> list[float]:
    """Return the probabilities of choices among themselves, from their log-probabilities in nats."""
    top = max(logprobs)
    weights = [math.exp(logprob - top) for logprob in logprobs]
    return [weight / sum(weights) for weight in weights]


def _choice(text: str, choices: Sequence[str]) -> Outcome:
    index = questions.chosen(text, choices)
    if index is None:
        return Failure("nonsense", f"none of {', '.join(choices)} stands in {text[-80:]!r}")
    return [float(i == index) for i in range(len(choices))]


def _probabilities(outcomes: Mapping[str, Outcome]) -> dict[str, list[float]]:
    """Return the outcomes that are answers."""
    return {key: outcome for key, outcome in outcomes.items() if not isinstance(outcome, Failure)}


def _is_nonsense(outcome: Outcome) -> bool:
    return isinstance(outcome, Failure) and outcome.kind == "nonsense"
