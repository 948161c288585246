from __future__ import annotations

from alignlab.evaluation.accuracy_intervals import accuracy_intervals
from alignlab.evaluation.results import EvaluatedProblem, EvaluationResult
from alignlab.functional.intervals import mean_interval, wilson_interval


def problem(greedy: bool | None, num_correct: int) -> EvaluatedProblem:
    return EvaluatedProblem("?", "4", "4", greedy, ("4",), num_correct)


def test_intervals_are_over_the_judged_problems():
    samples = (problem(True, 4), problem(False, 1), problem(None, 0), problem(True, 0))
    result = EvaluationResult(
        greedy=2 / 3, sampled=5 / 12, strict_greedy=None, strict_sampled=0.25, pass_at={1: 5 / 12, 2: 0.5},
        num_problems=4, num_samples=4, samples=samples, num_judged=3,
    )
    assert accuracy_intervals(result) == {
        "greedy": wilson_interval(2 / 3, 3),
        "sampled": mean_interval([1.0, 0.25, 0.0]),
        "pass@1": mean_interval([1.0, 0.25, 0.0]),
        # 1 - C(3, 2) / C(4, 2) = 1/2 of the problem with one right of four
        "pass@2": mean_interval([1.0, 0.5, 0.0]),
        "strict_sampled": wilson_interval(0.25, 3),
    }
