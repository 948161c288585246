"""Graded problems and engines made by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from alignlab.evaluation.strategies.graded import GradedProblem

MakeProblem = Callable[..., GradedProblem]


def make_problem(
    answers: Sequence[int | None], right: Sequence[float], *, row: int = 0, tokens: Sequence[int] | None = None,
    logprobs: Sequence[Sequence[float]] | None = None, **scores: Sequence[float],
) -> GradedProblem:
    """A problem whose samples have one token each, of log-prob -1, unless told otherwise."""
    of_samples = [[-1.0]] * len(right) if logprobs is None else logprobs
    means = tuple(sum(values) / len(values) for values in of_samples)
    return GradedProblem(
        row=row,
        right=tuple(right),
        answers=tuple(answers),
        scores={"logprob": means, **{name: tuple(values) for name, values in scores.items()}},
        tokens=tuple(tokens or map(len, of_samples)),
        logprobs=tuple(map(tuple, of_samples)),
    )


@pytest.fixture
def problem() -> MakeProblem:
    return make_problem
