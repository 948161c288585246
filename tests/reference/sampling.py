"""Sampling as the documentation says it, one row and one token at a time, in Python's own numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from alignlab.types import SamplingParams

_MASK = (1 << 64) - 1


def distribution(
    logits: Sequence[float], sampling: SamplingParams, *, seen: Collection[int] = (), banned: Collection[int] = ()
) -> list[float]:
    """Probability of each token of one row."""
    values = list(logits)
    for token in seen:
        penalty = sampling.repetition_penalty
        values[token] = values[token] / penalty if values[token] > 0 else values[token] * penalty
    for token in banned:
        values[token] = -math.inf
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
    return _normalised([p if p >= floor else 0.0 for p in probs])


def _normalised(weights: Sequence[float]) -> list[float]:
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def pick(probs: Sequence[float], uniform: float) -> int:
    """The first token whose cumulative probability exceeds `uniform`."""
    cumulative = 0.0
    for token, p in enumerate(probs):
        cumulative += p
        if cumulative > uniform:
            return token
    return max(token for token, p in enumerate(probs) if p > 0)


def uniform(key: int, position: int) -> float:
    """The (position + 1)th number of SplitMix64 started at `key`, from its upper 53 bits."""
    state = (key + (position + 1) * 0x9E3779B97F4A7C15) & _MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((state ^ (state >> 31)) >> 11) / (1 << 53)
