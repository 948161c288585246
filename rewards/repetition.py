"""Penalty for a completion that repeats itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from alignlab_rewards.answers.options import check_whole

from alignlab.types import Text, message_text


def repetition(*, completions: Sequence[Text], ngram_size: int = 3, **columns: Any) -> list[float | None]:
    """Return minus the fraction of a completion's word n-grams that repeat an earlier one: from 0.0 to almost -1.0.

        value = distinct n-grams / n-grams - 1

    Args:
        completions: strings or chat messages; words are what white space separates, without regard to case.
        ngram_size: words of an n-gram, >= 1. A completion of fewer words gets 0.0.
        columns: unused.

    Reference: the repetition penalty of Yeo et al. (2025), arXiv:2502.03373, over the whole completion.
    """
    check_whole("repetition", "ngram_size", ngram_size)
    if ngram_size < 1:
        raise ValueError(f"repetition needs ngram_size >= 1, and got {ngram_size}")
    values: list[float | None] = []
    for completion in completions:
        words = message_text(completion).casefold().split()
        ngrams = [tuple(words[i : i + ngram_size]) for i in range(len(words) - ngram_size + 1)]
        values.append(len(set(ngrams)) / len(ngrams) - 1.0 if ngrams else 0.0)
    return values
