"""Results of measuring a model on held-out data: accuracy, preferences, labels, likelihood; and their files."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from alignlab.files.atomic_files import write_atomically
from alignlab.files.digests import DamagedError, parse_sealed, sealed

logger = logging.getLogger(__name__)
Intervals = Mapping[str, tuple[float, float]]
"""Bounds of the 95 % interval of each figure, by the name of its field."""
_LARGEST_EXPONENT = math.log(sys.float_info.max)


@dataclass(frozen=True)
class _Result:
    """A result whose JSON holds its fields."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the result that `to_json` has written."""
        return cls(**value)

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log, by name."""
        raise NotImplementedError


class _WithIntervals(_Result):
    """A result that holds the intervals of its figures."""

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the result that `to_json` has written; without intervals, that of an earlier version."""
        intervals = {name: tuple(bounds) for name, bounds in value.get("intervals", {}).items()}
        return cls(**dict(value) | {"intervals": intervals})


@dataclass(frozen=True)
class EvaluatedProblem:
    """A problem and the policy's completions of it.

    Attributes:
        prompt: the problem's text.
        answer: the row's `answer` column; None if there is none.
        greedy: the greedy completion's text.
        greedy_correct: whether the greedy completion is right; None where the scorer does not apply to the problem.
        sampled: texts of the first few sampled completions.
        num_correct: sampled completions that are right; 0 where the scorer does not apply.
    """

    prompt: str
    answer: str | None
    greedy: str
    greedy_correct: bool | None
    sampled: tuple[str, ...]
    num_correct: int


@dataclass(frozen=True)
class EvaluationResult(_Result):
    """Accuracy over the problems of a set that the scorer applies to; fractions are in [0, 1].

    Attributes:
        greedy: fraction of problems whose greedy completion the scorer values at exactly 1.
        sampled: fraction of sampled completions that the scorer values at exactly 1.
        strict_greedy, strict_sampled: fractions of completions that are the answer and nothing else; None without an
            answer column.
        pass_at: by k, the unbiased estimate of the probability that at least one of k sampled completions is right.
        num_problems, num_samples: problems asked, and sampled completions of each.
        samples: all problems with their completions, in the order of the data.
        greedy_tokens, sampled_tokens: mean length of a completion; None in results of earlier versions.
        num_judged: problems that the scorer applies to; None for all.
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
        """Number of problems that the fractions are about."""
        return self.num_problems if self.num_judged is None else self.num_judged

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON."""
        return super().to_json() | {"pass_at": {str(k): value for k, value in self.pass_at.items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Return the result that `to_json` has written; a report's has intervals beside it, which follow from it."""
        value = {name: field for name, field in value.items() if name != "intervals"}
        samples = tuple(EvaluatedProblem(**row | {"sampled": tuple(row["sampled"])}) for row in value["samples"])
        return cls(**value | {"pass_at": {int(k): v for k, v in value["pass_at"].items()}, "samples": samples})

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log: eval/greedy, eval/sampled, eval/pass@k and those of the others that are not None:
        eval/strict_greedy, eval/strict_sampled, eval/num_judged."""
        fields = {
            "eval/greedy": self.greedy,
            "eval/sampled": self.sampled,
            "eval/strict_greedy": self.strict_greedy,
            "eval/strict_sampled": self.strict_sampled,
            "eval/num_judged": self.num_judged,
        }
        passes = {f"eval/pass@{k}": value for k, value in self.pass_at.items()}
        return {name: value for name, value in fields.items() if value is not None} | passes


@dataclass(frozen=True)
class PreferenceResult(_WithIntervals):
    """Agreement with held-out preferences.

    Attributes:
        accuracy: fraction of pairs whose chosen completion has the higher reward or implicit reward.
        margin: mean difference of the two, in the loss's units.
        loss: mean over pairs.
        num_pairs: number of pairs.
        calibration_error, brier: of a reward model's probabilities, see `functional.reward_losses`; None elsewhere.
        intervals: of the figures above, over pairs; empty in results of earlier versions.
    """

    accuracy: float
    margin: float
    loss: float
    num_pairs: int
    calibration_error: float | None = None
    brier: float | None = None
    intervals: Intervals = field(default_factory=dict, repr=False)

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log: eval/ and the field's name."""
        names = ("accuracy", "margin", "loss", "calibration_error", "brier")
        return {f"eval/{name}": value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True)
class LabelResult(_WithIntervals):
    """Agreement with held-out completions that are labelled good or bad, each by itself.

    Attributes:
        accuracy: fraction of labels that the policy agrees with.
        margin: mean reward of the good completions minus that of the bad ones.
        loss: mean over completions.
        num_completions: number of completions.
        intervals: of the figures above, over completions; empty in results of earlier versions.
    """

    accuracy: float
    margin: float
    loss: float
    num_completions: int
    intervals: Intervals = field(default_factory=dict, repr=False)

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log: eval/ and the field's name."""
        return {"eval/accuracy": self.accuracy, "eval/margin": self.margin, "eval/loss": self.loss}


@dataclass(frozen=True)
class LikelihoodResult(_WithIntervals):
    """Likelihood of held-out completions.

    Attributes:
        loss: mean of -log p over all completion tokens, nats.
        num_examples, num_tokens: number of completions and of their tokens.
        intervals: of the loss and of the perplexity, over completions; empty in results of earlier versions.
    """

    loss: float
    num_examples: int
    num_tokens: int
    intervals: Intervals = field(default_factory=dict, repr=False)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinity where that is larger than any floating-point number."""
        return perplexity_of(self.loss)

    def metrics(self) -> dict[str, float]:
        """Return the numbers to log: eval/loss, eval/perplexity."""
        return {"eval/loss": self.loss, "eval/perplexity": self.perplexity}


def perplexity_of(loss: float) -> float:
    """Return exp(loss); infinity where that is larger than any floating-point number."""
    return math.exp(loss) if loss < _LARGEST_EXPONENT else math.inf


Evaluation = EvaluationResult | PreferenceResult | LabelResult | LikelihoodResult


def evaluation_from_json(value: Mapping[str, Any]) -> Evaluation:
    """Return the result of any kind that `to_json` has written; the kinds differ in what they count."""
    if "num_completions" in value:
        return LabelResult.from_json(value)
    if "num_examples" in value:
        return LikelihoodResult.from_json(value)
    return (PreferenceResult if "num_pairs" in value else EvaluationResult).from_json(value)


def write_evaluation(path: Path, result: Evaluation) -> None:
    """Write a result to a file, with a digest of its content."""
    write_atomically(path, json.dumps(sealed(result.to_json())))


def read_evaluation(path: Path) -> Evaluation | None:
    """Return the result in a file; None, with a warning, for a damaged file, which can be measured again."""
    if not path.exists():
        return None
    try:
        return evaluation_from_json(parse_sealed(path.read_bytes()))
    except DamagedError as error:
        logger.warning("%s is damaged (%s) or of an earlier version: it is measured again", path, error)
        return None
