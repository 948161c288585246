"""Confidence intervals of the accuracies of one model, over the problems."""

from __future__ import annotations

from alignlab.evaluation.results import EvaluationResult
from alignlab.functional.estimation import pass_at_k
from alignlab.functional.intervals import mean_interval, wilson_interval


def accuracy_intervals(result: EvaluationResult) -> dict[str, tuple[float, float]]:
    """Return the 95 % interval of each accuracy, by its name in `EvaluationResult.metrics` without eval/.

    Of greedy answers Wilson's; of sampled ones the bootstrap's over problems, whose samples belong together. Strict
    accuracies are not known by problem: Wilson's interval of as many problems is wide enough for them.
    """
    judged = [problem for problem in result.samples if problem.greedy_correct is not None]
    n, count = result.num_samples, max(1, len(judged))
    intervals = {"greedy": wilson_interval(result.greedy, count)}
    if judged:
        intervals["sampled"] = mean_interval([problem.num_correct / n for problem in judged])
        for k in result.pass_at:
            intervals[f"pass@{k}"] = mean_interval([pass_at_k(n, problem.num_correct, k) for problem in judged])
    for name in ("strict_greedy", "strict_sampled"):
        value = getattr(result, name)
        if value is not None:
            intervals[name] = wilson_interval(value, count)
    return intervals
