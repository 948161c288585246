"""Accuracy on held-out problems: each is answered greedily and by sampling, and a scorer says what is right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from alignlab.config.rewards import RewardLimits
from alignlab.config.rollout import SamplingSettings
from alignlab.errors import ConfigError, RewardError
from alignlab.evaluation.results import EvaluatedProblem, EvaluationResult
from alignlab.functional.estimation import pass_at_k
from alignlab.rollout.engine import RolloutEngine
from alignlab.scoring.columns import check_columns
from alignlab.scoring.loading import LoadedReward
from alignlab.scoring.reward_model import ModelReward
from alignlab.scoring.runner import RewardRunner
from alignlab.types import Prompt, Rollout, message_text

ANSWER_COLUMN = "answer"
RIGHT = 1.0
NUM_TEXTS = 4
"""Sampled completions of a problem whose texts the result holds."""


@dataclass(frozen=True)
class _Answers:
    """The completions of one problem.

    Attributes:
        greedy: with one completion.
        sampled: with `num_samples` completions.
        greedy_right, sampled_right: whether each is right; None where the scorer does not apply to all of them.
    """

    greedy: Rollout
    sampled: Rollout
    greedy_right: bool | None
    sampled_right: tuple[bool, ...] | None

    @classmethod
    def of(
        cls, greedy: Rollout, sampled: Rollout, greedy_values: Sequence[float | None],
        sampled_values: Sequence[float | None],
    ) -> _Answers:
        if None in (*greedy_values, *sampled_values):
            return cls(greedy, sampled, None, None)
        return cls(greedy, sampled, greedy_values[0] == RIGHT, tuple(value == RIGHT for value in sampled_values))

    @property
    def num_right(self) -> int:
        """Sampled completions that are right."""
        return sum(self.sampled_right or ())

    def problem(self) -> EvaluatedProblem:
        """Return the problem's entry in the result."""
        answer = self.greedy.prompt.columns.get(ANSWER_COLUMN)
        return EvaluatedProblem(
            prompt=message_text(self.greedy.prompt.text),
            answer=None if answer is None else str(answer),
            greedy=self.greedy.completions[0].text,
            greedy_correct=self.greedy_right,
            sampled=tuple(completion.text for completion in self.sampled.completions[:NUM_TEXTS]),
            num_correct=self.num_right,
        )


def evaluate(
    engine: RolloutEngine,
    prompts: Sequence[Prompt],
    scorer: LoadedReward,
    *,
    sampling: SamplingSettings,
    num_samples: int,
    seed: int,
    pass_at: Sequence[int] = (1,),
    time_limit_s: float = 300.0,
) -> EvaluationResult:
    """Answer every problem once greedily and `num_samples` times by sampling, and count the right answers.

    A completion is right where the scorer's value is exactly 1; partial credit does not count. A problem is judged
    where the scorer applies to all completions of it. Other problems, such as those of another task, are left out of
    the fractions.

    Args:
        engine: generates the completions.
        prompts: the problems.
        scorer: the reward whose value 1 means a right answer.
        sampling: settings of the sampled pass; the greedy pass differs in its temperature, 0, alone.
        num_samples: sampled completions of a problem, >= 1.
        seed: seed of the sampled pass.
        pass_at: the k of pass@k, each from 1 to `num_samples`.
        time_limit_s: limit of one call of the scorer, on all completions of a pass.

    Raises:
        ConfigError: there are no problems, a k is out of range, or the scorer needs a column that no problem has.
        RewardError: a call of the scorer fails, or the scorer applies to no problem; an accuracy must not hide that.
    """
    check_problems(prompts, scorer, pass_at, num_samples)
    greedy_sampling = sampling.model_copy(update={"temperature": 0.0})
    greedy = engine.generate(prompts, greedy_sampling.params(n=1, seed=seed))
    sampled = engine.generate(prompts, sampling.params(n=num_samples, seed=seed))
    greedy_values, sampled_values = (_values(rollouts, scorer, time_limit_s) for rollouts in (greedy, sampled))
    answers = list(map(_Answers.of, greedy, sampled, greedy_values, sampled_values))
    judged = _judged(answers, scorer)
    return EvaluationResult(
        greedy=fmean(bool(answer.greedy_right) for answer in judged),
        sampled=sum(answer.num_right for answer in judged) / (len(judged) * num_samples),
        strict_greedy=_strict_accuracy([answer.greedy for answer in judged]),
        strict_sampled=_strict_accuracy([answer.sampled for answer in judged]),
        pass_at={k: fmean(pass_at_k(num_samples, answer.num_right, k) for answer in judged) for k in pass_at},
        num_problems=len(prompts),
        num_samples=num_samples,
        samples=tuple(answer.problem() for answer in answers),
        greedy_tokens=_mean_tokens(greedy),
        sampled_tokens=_mean_tokens(sampled),
        num_judged=None if len(judged) == len(answers) else len(judged),
    )


def require_scorer(scorer: LoadedReward) -> None:
    """Raise if a reward cannot say that a completion is right.

    Raises:
        ConfigError: the reward is a reward model, whose values are never exactly 1.
    """
    if isinstance(scorer.function, ModelReward):
        raise ConfigError(
            f"evaluation.scorer must be a reward function whose value 1 means a right answer, and {scorer.name} is a "
            "reward model; name another scorer, or leave out eval_data"
        )


def check_problems(
    prompts: Sequence[Prompt], scorer: LoadedReward, pass_at: Sequence[int], num_samples: int
) -> None:
    """Raise a ConfigError if the problems cannot be answered or scored; see `evaluate`."""
    require_scorer(scorer)
    if not prompts:
        raise ConfigError("an evaluation needs at least one problem, and got 0; check eval_data")
    out_of_range = [k for k in pass_at if not 1 <= k <= num_samples]
    if out_of_range:
        raise ConfigError(
            f"evaluation.pass_at holds {out_of_range[0]}, and each k must be from 1 to num_samples ({num_samples}); "
            "raise num_samples or lower k"
        )
    check_columns([scorer], prompts, data="the evaluation data")


def _values(
    rollouts: Sequence[Rollout], scorer: LoadedReward, time_limit_s: float
) -> list[Sequence[float | None]]:
    """Return the scorer's values of each problem's completions."""
    runner = RewardRunner([scorer], RewardLimits(time_limit_s=time_limit_s, max_failures=0))
    try:
        scored = runner.score(rollouts)
        runner.metrics()  # a scorer that prints is named in the log
    except RewardError as error:
        raise RewardError(
            f"the scorer of an evaluation must not fail, whatever reward_limits allows: {error}"
        ) from error
    finally:
        runner.close()
    return [rollout.reward_parts[scorer.name] for rollout in scored]


def _judged(answers: Sequence[_Answers], scorer: LoadedReward) -> list[_Answers]:
    """Return the answers that the scorer applies to.

    Raises:
        RewardError: there are none.
    """
    judged = [answer for answer in answers if answer.sampled_right is not None]
    if not judged:
        raise RewardError(
            f"the scorer of an evaluation must value the completions of some problems, and {scorer.name} gave None for "
            f"each of {len(answers)}; choose another evaluation.scorer, or other eval_data"
        )
    return judged


def _strict_accuracy(rollouts: Sequence[Rollout]) -> float | None:
    """Return the fraction of completions that are the answer and nothing else; None where a row has no answer."""
    if any(ANSWER_COLUMN not in rollout.prompt.columns for rollout in rollouts):
        return None
    return fmean(matches for rollout in rollouts for matches in _exact_matches(rollout))


def _exact_matches(rollout: Rollout) -> Iterable[bool]:
    answer = str(rollout.prompt.columns[ANSWER_COLUMN]).strip()
    return (completion.text.strip() == answer for completion in rollout.completions)


def _mean_tokens(rollouts: Sequence[Rollout]) -> float:
    return fmean(len(completion.token_ids) for rollout in rollouts for completion in rollout.completions)
