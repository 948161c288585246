"""Questions to a judge with their right answers, made of pairs whose better completion is known, to train a judge.

A judge that writes before it chooses may be taught what to write, such as the solution: Zhang et al. (2024),
arXiv:2408.15240, Sec. 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alignlab.config.judge import Constitution, PromptedSettings
from alignlab.scoring.judges.questions import FIRST_OR_SECOND, comparison, rating
from alignlab.types import Text


class KnownPair(NamedTuple):
    """Two completions of a prompt.

    Attributes:
        prompt: the prompt of both.
        better, worse: the completions.
        reason: text that a judge is trained to write before it chooses, on separate lines; may be empty.
    """

    prompt: Text
    better: str
    worse: str
    reason: str = ""


def comparisons(
    constitution: Constitution, pairs: Sequence[KnownPair], settings: PromptedSettings
) -> Iterator[Mapping[str, Any]]:
    """Yield supervised rows (prompt, completion) of comparisons: each pair, by each principle, in both orders."""
    with_reason = settings.answers == "sampled"
    for pair in pairs:
        for principle in constitution.principles:
            orders = ((pair.better, pair.worse), (pair.worse, pair.better))
            for (shown_first, shown_second), choice in zip(orders, FIRST_OR_SECOND, strict=True):
                question = comparison(
                    constitution, principle, pair.prompt, shown_first, shown_second, reason=with_reason
                )
                yield {"prompt": list(question), "completion": _answer(pair, choice)}


def rated(
    constitution: Constitution, pairs: Sequence[KnownPair], settings: PromptedSettings
) -> Iterator[Mapping[str, Any]]:
    """Yield supervised rows of ratings, by each principle: `max_rating` for a pair's better text, 1 for the worse."""
    top, with_reason = settings.max_rating, settings.answers == "sampled"
    for pair in pairs:
        for principle in constitution.principles:
            for text, grade in ((pair.better, top), (pair.worse, 1)):
                question = rating(constitution, principle, pair.prompt, text, max_rating=top, reason=with_reason)
                yield {"prompt": list(question), "completion": _answer(pair, str(grade))}


def _answer(pair: KnownPair, choice: str) -> str:
    return f"{pair.reason}\n{choice}" if pair.reason else choice
