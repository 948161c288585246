"""How much of a training is sharpening: what the trained model says at once, and the first one with more samples.

Reference: Yue et al. (2025), arXiv:2504.13837: base models reach trained ones in pass@k at large k.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from alignlab.evaluation.strategies.figures import DIGITS, Figure
from alignlab.evaluation.strategies.measured import MeasuredStrategies
from alignlab.evaluation.strategies.voting import ORACLE
from alignlab.functional.intervals import ratio_interval


def sharpening(first: MeasuredStrategies, second: MeasuredStrategies) -> dict[str, Any]:
    """Return how the gain of the second model in single samples divides, with 95 % intervals over the problems.

    - `gain`: of pass@1. `gain_within_reach`: the part from problems that a sample of the first model solves, which
      training made likelier: sharpening. `gain_beyond_reach`: the part from problems that none of its samples solves.
    - `matched_by`: by strategy of the first model, the smallest k, and its tokens, that reach the second one's pass@1;
      null where none does.
    - `oracle_crosses_at`: the smallest k from which on the first model's pass@k is at least the second one's; null
      where it stays below.

    Problems that one of the two was not judged on are left out.
    """
    later = {problem.row: problem for problem in second.problems}
    pairs = [(problem, later[problem.row]) for problem in first.problems if problem.row in later]
    gains = [fmean(b.right) - fmean(a.right) for a, b in pairs]
    within = [gain if any(a.right) else 0.0 for gain, (a, _) in zip(gains, pairs, strict=True)]
    beyond = [gain - inside for gain, inside in zip(gains, within, strict=True)]
    goal = fmean(fmean(b.right) for _, b in pairs)
    names = dict.fromkeys(figure.strategy for figure in first.figures)
    return {
        "first": first.name, "second": second.name, "gain": _mean(gains), "gain_within_reach": _mean(within),
        "gain_beyond_reach": _mean(beyond), "matched_by": {name: _reaching(first.of(name), goal) for name in names},
        "oracle_crosses_at": _crossing(first.of(ORACLE), second.of(ORACLE)),
    }  # fmt: skip


def describe_sharpening(result: dict[str, Any]) -> str:
    """Return the result as sentences."""
    numbers = {
        name: f"{value['value']:+.3f} ({value['low']:+.2f}..{value['high']:+.2f})"
        for name, value in result.items() if name.startswith("gain")
    }  # fmt: skip
    matched = [
        f"{name} of {reached['k']} ({reached['tokens']:.0f} tokens)"
        for name, reached in result["matched_by"].items() if reached is not None
    ]  # fmt: skip
    crossing = result["oracle_crosses_at"]
    return (
        f"{result['second']} gains {numbers['gain']} over {result['first']} in single samples: "
        f"{numbers['gain_within_reach']} on problems that a sample of {result['first']} solves (sharpening), "
        f"{numbers['gain_beyond_reach']} on others. {result['first']} reaches its single samples by "
        f"{', '.join(matched) or 'none of the strategies'}; its pass@k "
        + (f"is as high from k = {crossing} on." if crossing is not None else "stays below.")
    )


def _mean(values: Sequence[float]) -> dict[str, float]:
    low, high = ratio_interval(values, [1.0] * len(values))
    return {"value": round(fmean(values), DIGITS), "low": round(low, DIGITS), "high": round(high, DIGITS)}


def _reaching(figures: Iterable[Figure], goal: float) -> dict[str, float] | None:
    reaching = [figure for figure in figures if figure.accuracy >= goal]
    if not reaching:
        return None
    cheapest = min(reaching, key=lambda figure: figure.tokens)
    return {"k": cheapest.k, "tokens": round(cheapest.tokens, 1)}


def _crossing(first: Sequence[Figure], second: Sequence[Figure]) -> int | None:
    """Return the smallest k from which on the first oracle is not below the second."""
    crossing = None
    for a, b in sorted(zip(first, second, strict=True), key=lambda pair: -pair[0].k):
        if a.accuracy < b.accuracy:
            break
        crossing = a.k
    return crossing
