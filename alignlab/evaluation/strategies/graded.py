"""The samples of a pool, graded: which are right, which answer each gives, what each scores."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from alignlab.config.rewards import RewardLimits
from alignlab.errors import ConfigError, RewardError
from alignlab.evaluation.strategies.pool import Pool
from alignlab.evaluation.strategies.settings import LOGPROB
from alignlab.scoring.loading import LoadedReward
from alignlab.scoring.runner import RewardRunner
from alignlab.types import Completion, Rollout

RIGHT = 1.0
SAMPLES_A_CALL = 4096
"""Samples from which on a reward is called again, so that its time limit does not grow with the pool."""


@dataclass(frozen=True)
class GradedProblem:
    """A problem and its n samples.

    Attributes:
        row: of the problem in the pool.
        right: 1 for a sample that the scorer values at exactly 1, else 0.
        answers: number of each sample's answer, from 0 in the order of appearance; None for a sample that states none,
            and everywhere if answers are not read.
        scores: by the name of a reward, its value of each sample; -inf where it gave none. `logprob`: the mean log-prob
            of the sample's tokens.
        tokens: sampled tokens of each sample.
        logprobs: log-probs of these tokens under the model, nats.
    """

    row: int
    right: tuple[float, ...]
    answers: tuple[int | None, ...]
    scores: Mapping[str, tuple[float, ...]]
    tokens: tuple[int, ...]
    logprobs: tuple[tuple[float, ...], ...]

    @property
    def num_samples(self) -> int:
        """n."""
        return len(self.right)

    def votes(self) -> list[tuple[int, float]]:
        """Return of each distinct answer the number of samples that give it, and the fraction of them that is right."""
        counts = Counter(answer for answer in self.answers if answer is not None)
        rights = Counter[int]()
        for answer, right in zip(self.answers, self.right, strict=True):
            if answer is not None:
                rights[answer] += int(right)
        return [(count, rights[answer] / count) for answer, count in sorted(counts.items())]


class AnswerReader:
    """Reads answers by a reward's own rule: its attributes `read_answer` and `same_answer`.

    Args:
        reward: the reward that decides which answers are right.

    Raises:
        ConfigError: the reward has no `read_answer`.
    """

    def __init__(self, reward: LoadedReward) -> None:
        read = getattr(reward.function, "read_answer", None)
        if not callable(read):
            raise ConfigError(
                f"votes need a reward that says how an answer is read from a completion, and {reward.name} has no "
                "attribute read_answer; use math_answer, reasoning_gym_answer or exact_match, or set "
                f"{reward.name}.read_answer = a function from a completion's text to its answer, or None (in a thread, "
                "not run_in: process)"
            )
        self._name = reward.name
        self._read: Callable[..., str | None] = read
        self._same: Callable[[str, str], bool] | None = getattr(reward.function, "same_answer", None)
        parameters = inspect.signature(read).parameters
        self._options = {name: value for name, value in reward.options.items() if name in parameters}

    def read(self, text: str) -> str | None:
        """Return the answer in a completion's text; None where it states none.

        Raises:
            RewardError: the function fails, or returns something else.
        """
        try:
            answer = self._read(text, **self._options)
        except Exception as error:  # the function is the reward author's code
            raise RewardError(
                f"{self._name}.read_answer must return an answer or None, and failed on {text!r:.200}: "
                f"{type(error).__name__}: {error}; correct it"
            ) from error
        if not isinstance(answer, str | None):
            raise RewardError(
                f"{self._name}.read_answer must return a text or None, and returned {type(answer).__name__} for "
                f"{text!r:.200}; write str(answer)"
            )
        return answer

    def numbers(self, texts: Sequence[str]) -> tuple[int | None, ...]:
        """Return a number for each completion's answer, the same for equal answers; None where it states none."""
        numbers: dict[str, int] = {}
        found: list[str] = []
        answers = [self.read(text) for text in texts]
        for answer in answers:
            if answer is not None and answer not in numbers:
                equal = (number for number, other in enumerate(found) if self._are_equal(answer, other))
                numbers[answer] = next(equal, len(found))
                if numbers[answer] == len(found):
                    found.append(answer)
        return tuple(None if answer is None else numbers[answer] for answer in answers)

    def _are_equal(self, answer: str, other: str) -> bool:
        return self._same is not None and (self._same(answer, other) or self._same(other, answer))


def grade(
    pool: Pool, scorer: LoadedReward, *, rewards: Mapping[str, LoadedReward] | None = None,
    reader: AnswerReader | None = None, time_limit_s: float = 300.0,
) -> list[GradedProblem]:
    """Return the graded problems of a pool, without those that the scorer does not apply to.

    Args:
        pool: the samples.
        scorer: the reward whose value 1 means a right answer.
        rewards: further rewards, by the name that strategies call them.
        reader: reads the answers; None if no strategy counts votes.
        time_limit_s: limit of one call of a reward, on about `SAMPLES_A_CALL` samples.

    Raises:
        RewardError: a call fails, or the scorer applies to no problem.
    """
    named = {"": scorer, **(rewards or {})}
    values = {name: _values(pool.rollouts, reward, time_limit_s) for name, reward in named.items()}
    graded = [
        _graded(row, rollout, {name: of_reward[row] for name, of_reward in values.items()}, reader)
        for row, rollout in enumerate(pool.rollouts)
        if None not in values[""][row]
    ]
    if not graded:
        raise RewardError(
            f"the scorer of an evaluation must value the completions of some problems, and {scorer.name} gave None for "
            f"each of {len(pool.rollouts)}; choose another evaluation.scorer, or other eval_data"
        )
    return graded


def _graded(
    row: int, rollout: Rollout, values: Mapping[str, Sequence[float | None]], reader: AnswerReader | None
) -> GradedProblem:
    texts = [completion.text for completion in rollout.completions]
    logprobs = tuple(sampled_logprobs(completion) for completion in rollout.completions)
    scores = {
        name: tuple(-math.inf if value is None else value for value in of_reward)
        for name, of_reward in values.items() if name
    }  # fmt: skip
    return GradedProblem(
        row=row,
        right=tuple(float(value == RIGHT) for value in values[""]),
        answers=(None,) * len(texts) if reader is None else reader.numbers(texts),
        scores={**scores, LOGPROB: tuple(fmean(of_one) if of_one else -math.inf for of_one in logprobs)},
        tokens=tuple(map(len, logprobs)),
        logprobs=logprobs,
    )


def sampled_logprobs(completion: Completion) -> tuple[float, ...]:
    """Return the log-probs of the tokens that the policy wrote: the model's own where the engine reports them, else
    those of the distribution that was sampled from."""
    logprobs = completion.logprobs if completion.raw_logprobs is None else completion.raw_logprobs
    return tuple(itertools.compress(logprobs, completion.policy_tokens))


def _values(
    rollouts: Sequence[Rollout], reward: LoadedReward, time_limit_s: float
) -> list[tuple[float | None, ...]]:
    """Return a reward's values of each problem's samples."""
    runner = RewardRunner([reward], RewardLimits(time_limit_s=time_limit_s, max_failures=0))
    try:
        scored = [rollout for part in _calls(rollouts) for rollout in runner.score(part)]
        runner.metrics()  # a reward that prints is named in the log
    except RewardError as error:
        raise RewardError(f"a reward that strategies choose by must not fail: {error}") from error
    finally:
        runner.close()
    return [rollout.reward_parts[reward.name] for rollout in scored]


def _calls(rollouts: Sequence[Rollout]) -> Iterator[list[Rollout]]:
    """Yield the problems whose samples are scored in one call."""
    part: list[Rollout] = []
    for rollout in rollouts:
        part.append(rollout)
        if sum(len(of_part.completions) for of_part in part) >= SAMPLES_A_CALL:
            yield part
            part = []
    if part:
        yield part
