"""Accuracy on held-out problems: each is answered greedily and by sampling, and a scorer says what is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, Protocol

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


class SharedOut(Protocol):
    """The ranks that share the problems: `loop.ranks.Ranks`."""

    index: int
    count: int

    def gather_done(self, work: str, compute: Callable[[], Any]) -> list[Any]:
        """Return what each rank computes, which JSON must hold exactly; if one fails, all raise."""
        ...


@dataclass(frozen=True)
class _Measured:
    """What is measured of one problem; JSON holds it exactly.

    Attributes:
        row: of the problem.
        problem: its entry in the result, as a dict.
        is_judged: whether the scorer applies to all completions of it.
        exact_greedy, exact_sampled: completions that are the answer and nothing else; None without an answer.
        greedy_tokens, sampled_tokens: number of tokens of the greedy, and of all sampled completions.
    """

    row: int
    problem: dict[str, Any]
    is_judged: bool
    exact_greedy: int | None
    exact_sampled: int | None
    greedy_tokens: int
    sampled_tokens: int

    @classmethod
    def of(
        cls, row: int, greedy: Rollout, sampled: Rollout, greedy_values: Sequence[float | None],
        sampled_values: Sequence[float | None],
    ) -> _Measured:
        """Return what is kept of a problem: its completions, and what their values say."""
        is_judged = None not in (*greedy_values, *sampled_values)
        answer = greedy.prompt.columns.get(ANSWER_COLUMN)
        problem = EvaluatedProblem(
            prompt=message_text(greedy.prompt.text),
            answer=None if answer is None else str(answer),
            greedy=greedy.completions[0].text,
            greedy_correct=greedy_values[0] == RIGHT if is_judged else None,
            sampled=tuple(completion.text for completion in sampled.completions[:NUM_TEXTS]),
            num_correct=sum(value == RIGHT for value in sampled_values) if is_judged else 0,
        )
        return cls(
            row, asdict(problem), is_judged, _exact_matches(greedy), _exact_matches(sampled), _num_tokens(greedy),
            _num_tokens(sampled),
        )

    @property
    def num_right(self) -> int:
        """Sampled completions that are right."""
        return int(self.problem["num_correct"])

    def entry(self) -> EvaluatedProblem:
        """Return the problem's entry in the result."""
        return EvaluatedProblem(**self.problem | {"sampled": tuple(self.problem["sampled"])})


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
    ranks: SharedOut | None = None,
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
        ranks: those that share the problems, each with an engine of its own; all call this together, with the same
            problems, and have the same result as one alone.

    Raises:
        ConfigError: there are no problems, a k is out of range, or the scorer needs a column that no problem has.
        RewardError: a call of the scorer fails, or the scorer applies to no problem; an accuracy must not hide that.
    """
    check_problems(prompts, scorer, pass_at, num_samples)
    rows = list(range(len(prompts))) if ranks is None else _rows_of_ranks(prompts, ranks.count)[ranks.index]

    def measure_own() -> list[dict[str, Any]]:
        own = [prompts[row] for row in rows]
        measured = _measured(engine, own, scorer, sampling, num_samples, seed, time_limit_s)
        return [asdict(replace(of_problem, row=row)) for row, of_problem in zip(rows, measured, strict=True)]

    parts = [measure_own()] if ranks is None else ranks.gather_done("answering held-out problems", measure_own)
    of_all = sorted((_Measured(**values) for part in parts for values in part), key=lambda of_problem: of_problem.row)
    return _result(of_all, scorer, num_samples=num_samples, pass_at=pass_at)


def _rows_of_ranks(prompts: Sequence[Prompt], count: int) -> list[list[int]]:
    """Return the rows that each rank answers.

    Equal prompts stay together: an engine numbers their completions, so that each has a seed of its own.
    """
    numbers: dict[tuple[int, ...], int] = {}
    shares: list[list[int]] = [[] for _ in range(count)]
    for row, prompt in enumerate(prompts):
        shares[numbers.setdefault(prompt.token_ids, len(numbers)) % count].append(row)
    return shares


def _measured(
    engine: RolloutEngine, prompts: Sequence[Prompt], scorer: LoadedReward, sampling: SamplingSettings,
    num_samples: int, seed: int, time_limit_s: float,
) -> list[_Measured]:
    """Answer and score problems, whose rows are counted from 0."""
    greedy_sampling = sampling.model_copy(update={"temperature": 0.0})
    greedy = engine.generate(prompts, greedy_sampling.params(n=1, seed=seed))
    sampled = engine.generate(prompts, sampling.params(n=num_samples, seed=seed))
    if not prompts:  # a rank without problems generates nevertheless: others may share its vLLM
        return []
    greedy_values, sampled_values = (_values(rollouts, scorer, time_limit_s) for rollouts in (greedy, sampled))
    return list(map(_Measured.of, range(len(prompts)), greedy, sampled, greedy_values, sampled_values))


def _result(
    measured: Sequence[_Measured], scorer: LoadedReward, *, num_samples: int, pass_at: Sequence[int]
) -> EvaluationResult:
    """Return the result of all problems, in the order of their rows."""
    judged = _judged(measured, scorer)
    return EvaluationResult(
        greedy=fmean(bool(of_problem.problem["greedy_correct"]) for of_problem in judged),
        sampled=sum(of_problem.num_right for of_problem in judged) / (len(judged) * num_samples),
        strict_greedy=_strict_accuracy([of_problem.exact_greedy for of_problem in judged], 1),
        strict_sampled=_strict_accuracy([of_problem.exact_sampled for of_problem in judged], num_samples),
        pass_at={k: fmean(pass_at_k(num_samples, of_problem.num_right, k) for of_problem in judged) for k in pass_at},
        num_problems=len(measured),
        num_samples=num_samples,
        samples=tuple(of_problem.entry() for of_problem in measured),
        greedy_tokens=sum(of_problem.greedy_tokens for of_problem in measured) / len(measured),
        sampled_tokens=sum(of_problem.sampled_tokens for of_problem in measured) / (len(measured) * num_samples),
        num_judged=None if len(judged) == len(measured) else len(judged),
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


def _judged(measured: Sequence[_Measured], scorer: LoadedReward) -> list[_Measured]:
    """Return the problems that the scorer applies to.

    Raises:
        RewardError: there are none.
    """
    judged = [of_problem for of_problem in measured if of_problem.is_judged]
    if not judged:
        raise RewardError(
            f"the scorer of an evaluation must value the completions of some problems, and {scorer.name} gave None for "
            f"each of {len(measured)}; choose another evaluation.scorer, or other eval_data"
        )
    return judged


def _strict_accuracy(matches: Sequence[int | None], num_completions: int) -> float | None:
    """Return the fraction of completions that are the answer and nothing else; None where a row has no answer.

    Args:
        matches: of each problem, how many are.
        num_completions: of each problem.
    """
    known = [number for number in matches if number is not None]
    return sum(known) / (len(known) * num_completions) if len(known) == len(matches) else None


def _exact_matches(rollout: Rollout) -> int | None:
    if ANSWER_COLUMN not in rollout.prompt.columns:
        return None
    answer = str(rollout.prompt.columns[ANSWER_COLUMN]).strip()
    return sum(completion.text.strip() == answer for completion in rollout.completions)


def _num_tokens(rollout: Rollout) -> int:
    return sum(len(completion.token_ids) for completion in rollout.completions)
