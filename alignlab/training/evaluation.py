"""What is measured on held-out data: right answers, greedy and sampled; preferences, labels, likelihood."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from alignlab.atomic_files import write_atomically
from alignlab.config.rewards import RewardLimits
from alignlab.config.rollout import SamplingSettings
from alignlab.digests import DamagedError, parse_sealed, sealed
from alignlab.errors import ConfigError, RewardError
from alignlab.functional.estimators import pass_at_k
from alignlab.training.model_reward import ModelReward
from alignlab.training.reward_columns import check_columns
from alignlab.training.reward_functions import LoadedReward
from alignlab.training.reward_runner import RewardRunner
from alignlab.types import Completion, Prompt, Rollout, RolloutEngine, message_text

logger = logging.getLogger(__name__)
_Judged = tuple[list[bool | None], list[bool | None]] | None
"""Whether a problem's greedy completion and its sampled ones are right; None where the scorer does not apply."""
ANSWER_COLUMN = "answer"
RIGHT = 1.0
KEPT_TEXTS = 4
LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class EvaluatedProblem:
    """What the policy said to one problem.

    Attributes:
        prompt: the problem's text.
        answer: the row's `answer` column; None where there is none.
        greedy: the greedy completion's text.
        greedy_correct: whether the scorer calls it right; None where the scorer does not apply to the problem.
        sampled: texts of the first few sampled completions.
        num_correct: of all sampled completions, how many are right; 0 where the scorer does not apply.
    """

    prompt: str
    answer: str | None
    greedy: str
    greedy_correct: bool | None
    sampled: tuple[str, ...]
    num_correct: int


@dataclass(frozen=True)
class EvaluationResult:
    """Accuracy over the problems of a set that the scorer applies to, each a fraction in [0, 1].

    Attributes:
        greedy: problems whose greedy completion the scorer values at exactly 1.
        sampled: sampled completions that it values at exactly 1.
        strict_greedy, strict_sampled: completions that are the answer and nothing else; None without an answer column.
        pass_at: by k, the unbiased estimate that at least one of k sampled completions is right.
        num_problems, num_samples: problems asked, and sampled completions of each.
        samples: what was said to each problem, in the order of the problems.
        greedy_tokens, sampled_tokens: mean length of a completion; None where it was not counted.
        num_judged: problems that the scorer applies to, of which the fractions are; None for all.
    """

    greedy: float
    sampled: float
    strict_greedy: float | None
    strict_sampled: float | None
    pass_at: dict[int, float]
    num_problems: int
    num_samples: int
    samples: tuple[EvaluatedProblem, ...] = field(default=(), repr=False)
    greedy_tokens: float | None = None
    sampled_tokens: float | None = None
    num_judged: int | None = None

    @property
    def judged(self) -> int:
        """Problems that the fractions are of."""
        return self.num_problems if self.num_judged is None else self.num_judged

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self) | {"pass_at": {str(k): value for k, value in self.pass_at.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> EvaluationResult:
        """Take back what `to_json` gave."""
        samples = tuple(
            EvaluatedProblem(**sample | {"sampled": tuple(sample["sampled"])}) for sample in value["samples"]
        )
        return cls(**dict(value) | {"pass_at": {int(k): v for k, v in value["pass_at"].items()}, "samples": samples})

    def metrics(self) -> dict[str, float]:
        """The numbers, as they are logged: eval/greedy, eval/sampled, eval/pass@k and, where known, the strict ones;
        eval/num_judged where the scorer does not apply to all problems."""
        named = {
            "eval/greedy": self.greedy,
            "eval/sampled": self.sampled,
            "eval/strict_greedy": self.strict_greedy,
            "eval/strict_sampled": self.strict_sampled,
            "eval/num_judged": self.num_judged,
        }
        passes = {f"eval/pass@{k}": value for k, value in self.pass_at.items()}
        return {name: value for name, value in named.items() if value is not None} | passes


@dataclass(frozen=True)
class PreferenceResult:
    """What held-out preferences came to.

    Attributes:
        accuracy: pairs whose chosen completion leads.
        margin: by how much, on average, in the loss's units.
        loss: mean over pairs.
        num_pairs: that were looked at.
        calibration_error, brier: of a reward model's probabilities, see `functional.reward_losses`.
    """

    accuracy: float
    margin: float
    loss: float
    num_pairs: int
    calibration_error: float | None = None
    brier: float | None = None

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PreferenceResult:
        """Take back what `to_json` gave."""
        return cls(**value)

    def metrics(self) -> dict[str, float]:
        """The numbers, as they are logged."""
        named = {name: value for name, value in self.to_json().items() if name != "num_pairs" and value is not None}
        return {f"eval/{name}": value for name, value in named.items()}


@dataclass(frozen=True)
class LabelResult:
    """What held-out completions came to that are labelled good or bad, each by itself.

    Attributes:
        accuracy: labels that the policy agrees with.
        margin: mean reward of the good ones less that of the bad ones.
        loss: mean over completions.
        num_completions: that were looked at.
    """

    accuracy: float
    margin: float
    loss: float
    num_completions: int

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LabelResult:
        """Take back what `to_json` gave."""
        return cls(**value)

    def metrics(self) -> dict[str, float]:
        """The numbers, as they are logged."""
        return {"eval/accuracy": self.accuracy, "eval/margin": self.margin, "eval/loss": self.loss}


@dataclass(frozen=True)
class LikelihoodResult:
    """How likely held-out completions are.

    Attributes:
        loss: mean of -log p over all completion tokens, nats.
        num_examples, num_tokens: that were looked at.
    """

    loss: float
    num_examples: int
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """e to the loss; infinite where that is no floating-point number."""
        return math.exp(self.loss) if self.loss < LARGEST_EXPONENT else math.inf

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> LikelihoodResult:
        """Take back what `to_json` gave."""
        return cls(**value)

    def metrics(self) -> dict[str, float]:
        """The numbers, as they are logged."""
        return {"eval/loss": self.loss, "eval/perplexity": self.perplexity}


Evaluation = EvaluationResult | PreferenceResult | LabelResult | LikelihoodResult


def evaluation_from_json(value: Mapping[str, Any]) -> Evaluation:
    """Take back what `to_json` of any of them gave."""
    if "num_completions" in value:
        return LabelResult.from_json(value)
    if "num_examples" in value:
        return LikelihoodResult.from_json(value)
    return (PreferenceResult if "num_pairs" in value else EvaluationResult).from_json(value)


def write_evaluation(path: Path, result: Evaluation) -> None:
    """Keep what was measured, with its digest."""
    write_atomically(path, json.dumps(sealed(result.to_json())))


def read_evaluation(path: Path) -> Evaluation | None:
    """What was kept; None where nothing was, or it is damaged, which is said: it can be measured again."""
    if not path.exists():
        return None
    try:
        return evaluation_from_json(parse_sealed(path.read_bytes()))
    except DamagedError as error:
        logger.warning("%s is damaged (%s) or of an earlier version: it is measured again", path, error)
        return None


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
    """Answer every problem once greedily and `num_samples` times at random, and count what is right.

    A completion is right where the scorer's value is exactly 1; partial credit is not right. A problem is judged where
    the scorer applies to all completions of it: the others, such as those of another task, are counted and left out.

    Args:
        sampling: of the sampled pass; the greedy one differs in its temperature, 0, alone.
        seed: of the sampled pass.
        pass_at: the k of pass@k, each from 1 to `num_samples`.
        time_limit_s: for one call of the scorer on all completions of a pass.

    Raises:
        ConfigError: there are no problems, a k is out of range, or the scorer needs a column that they do not have.
        RewardError: the scorer fails, or applies to no problem: an accuracy must not hide that.
    """
    require_scorer(scorer)
    if not prompts:
        raise ConfigError("an evaluation needs at least one problem, and got 0; check eval_data")
    wrong = [k for k in pass_at if not 1 <= k <= num_samples]
    if wrong:
        raise ConfigError(
            f"evaluation.pass_at holds {wrong[0]}, and each k must be from 1 to num_samples ({num_samples}); "
            "raise num_samples or lower k"
        )
    check_columns([scorer], prompts, data="the evaluation data")
    greedy_sampling = sampling.model_copy(update={"temperature": 0.0})
    greedy = engine.generate(prompts, greedy_sampling.params(n=1, seed=seed))
    sampled = engine.generate(prompts, sampling.params(n=num_samples, seed=seed))
    values = zip(_right(greedy, scorer, time_limit_s), _right(sampled, scorer, time_limit_s), strict=True)
    judged = [None if None in (*one, *many) else (one, many) for one, many in values]
    places = _places(judged, scorer)
    greedy_right = [one for one, _ in filter(None, judged)]
    sampled_right = [many for _, many in filter(None, judged)]
    return EvaluationResult(
        greedy=_mean(greedy_right),
        sampled=_mean(sampled_right),
        strict_greedy=_strict_accuracy([greedy[i] for i in places]),
        strict_sampled=_strict_accuracy([sampled[i] for i in places]),
        pass_at={k: fmean(pass_at_k(num_samples, sum(map(bool, many)), k) for many in sampled_right) for k in pass_at},
        num_problems=len(prompts),
        num_samples=num_samples,
        samples=tuple(_problem(*each) for each in zip(greedy, sampled, judged, strict=True)),
        greedy_tokens=_mean_tokens(greedy),
        sampled_tokens=_mean_tokens(sampled),
        num_judged=None if len(places) == len(prompts) else len(places),
    )


def _places(judged: Sequence[_Judged], scorer: LoadedReward) -> list[int]:
    """Which problems are judged.

    Raises:
        RewardError: none is.
    """
    places = [i for i, known in enumerate(judged) if known is not None]
    if not places:
        raise RewardError(
            f"the scorer of an evaluation must value the completions of some problems, and {scorer.name} gave None for "
            f"each of {len(judged)}; choose another evaluation.scorer, or other eval_data"
        )
    return places


def require_scorer(scorer: LoadedReward) -> None:
    """Refuse what cannot say that a completion is right.

    Raises:
        ConfigError: it is a reward model, whose values are never exactly 1.
    """
    if isinstance(scorer.function, ModelReward):
        raise ConfigError(
            f"evaluation.scorer must be a reward function whose value 1 means a right answer, and {scorer.name} is a "
            "reward model; name another scorer, or leave out eval_data"
        )


def _right(rollouts: Sequence[Rollout], scorer: LoadedReward, time_limit_s: float) -> list[list[bool | None]]:
    """Whether each completion of each problem is right; None where the scorer does not apply."""
    runner = RewardRunner([scorer], RewardLimits(time_limit_s=time_limit_s, max_failures=0))
    try:
        scored = runner.score(rollouts)
    except RewardError as error:
        raise RewardError(
            f"the scorer of an evaluation must not fail, whatever reward_limits allows: {error}"
        ) from error
    finally:
        runner.close()
    values = [rollout.reward_parts[scorer.name] for rollout in scored]
    return [[None if value is None else value == RIGHT for value in group] for group in values]


def _strict_accuracy(rollouts: Sequence[Rollout]) -> float | None:
    if any(ANSWER_COLUMN not in rollout.prompt.columns for rollout in rollouts):
        return None
    return _mean([[_is_answer(rollout.prompt, c) for c in rollout.completions] for rollout in rollouts])


def _is_answer(prompt: Prompt, completion: Completion) -> bool:
    return completion.text.strip() == str(prompt.columns[ANSWER_COLUMN]).strip()


def _mean(right: Sequence[Sequence[bool | None]]) -> float:
    return fmean(bool(value) for group in right for value in group)


def _mean_tokens(rollouts: Sequence[Rollout]) -> float:
    return fmean(len(completion.token_ids) for rollout in rollouts for completion in rollout.completions)


def _problem(greedy: Rollout, sampled: Rollout, judged: _Judged) -> EvaluatedProblem:
    answer = greedy.prompt.columns.get(ANSWER_COLUMN)
    one, many = judged or ([None], [])
    return EvaluatedProblem(
        prompt=message_text(greedy.prompt.text),
        answer=None if answer is None else str(answer),
        greedy=greedy.completions[0].text,
        greedy_correct=one[0],
        sampled=tuple(completion.text for completion in sampled.completions[:KEPT_TEXTS]),
        num_correct=sum(map(bool, many)),
    )
