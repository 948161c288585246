"""Sampling as the documentation says it, one row and one token at a time, in Python's own numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from alignlab.types import SamplingParams

_MASK = (1 << 64) - 1


def distribution(
    logits: Sequence[float], sampling: SamplingParams, *, seen: Collection[int] = (), banned: Collection[int] = (),
    written: Sequence[int] = (), allowed: Collection[int] | None = None,
) -> list[float]:
    """Probability of each token of one row, after the tokens `written` of its completion."""
    values = list(logits)
    for token, bias in sampling.logit_bias:
        values[token] += bias
    for token in seen:
        penalty = sampling.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in set(written):
        values[token] -= sampling.presence_penalty
    for token in written:
        values[token] -= sampling.frequency_penalty
    for token in banned:
        values[token] = -math.inf
    if allowed is not None:
        values = [value if token in allowed else -math.inf for token, value in enumerate(values)]
    if sampling.temperature == 0:
        best = values.index(max(values))
        return [float(token == best) for token in range(len(values))]
    probs = _normalised([math.exp((value - max(values)) / sampling.temperature) for value in values])
    if sampling.top_k:
        last = sorted(probs, reverse=True)[:sampling.top_k][-1]
        probs = _normalised([p if p >= last else 0.0 for p in probs])
    if sampling.top_p < 1:
        kept, mass = 0.0, 0.0
        for p in sorted(probs, reverse=True):
            if mass < sampling.top_p:
                kept, mass = p, mass + p
        probs = [p if p >= kept else 0.0 for p in probs]
    floor = sampling.min_p * max(probs)
    return _typical(_normalised([p if p >= floor else 0.0 for p in probs]), sampling.typical_p)


def _typical(probs: Sequence[float], mass: float) -> list[float]:
    """Keep the tokens whose surprise is nearest to the entropy, ties included."""
    if mass == 1:
        return list(probs)
    entropy = -math.fsum(p * math.log(p) for p in probs if p > 0)
    distances = [abs(-math.log(p) - entropy) if p > 0 else math.inf for p in probs]
    last, kept = 0.0, 0.0
    for distance, p in sorted(zip(distances, probs, strict=True)):
        if kept < mass:
            last, kept = distance, kept + p
    return _normalised([p if d <= last + 1e-6 else 0.0 for d, p in zip(distances, probs, strict=True)])


def _normalised(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def race(probs: Sequence[float], key: int, position: int, *, chunk: int) -> int:
    """The token that arrives first: between chunks of the vocabulary by their sums, then inside the winner."""
    own = hashed(key, position)
    starts = range(0, len(probs), chunk)
    speeds = [math.fsum(probs[start : start + chunk]) / exponential(own, i) for i, start in enumerate(starts)]
    start = starts[speeds.index(max(speeds))]
    inside = [p / exponential(own, len(starts) + i) for i, p in enumerate(probs[start : start + chunk])]
    return start + inside.index(max(inside))


def exponential(key: int, number: int) -> float:
    """The exponential number of the upper 52 bits."""
    return -math.log1p(-((hashed(key, number) >> 12) + 0.5) / (1 << 52))


def hashed(key: int, position: int) -> int:
    """The (position + 1)th number of SplitMix64 started at `key`."""
    state = (key + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)
