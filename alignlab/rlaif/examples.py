"""Questions to a judge with their right answers, to teach or to test one by pairs whose better completion is known.

A judge that writes before it chooses may be taught what to write, such as the solution: Zhang et al. (2024),
arXiv:2408.15240, Sec. 4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from alignlab.config.constitution import Constitution
from alignlab.config.judge import PromptedSettings
from alignlab.rlaif.questions import FIRST_OR_SECOND, comparison, rating
from alignlab.types import Text


class KnownPair(NamedTuple):
    """Two completions of a prompt.

    Attributes:
        prompt: of both.
        better, worse: which is which.
        reason: what a judge says before it chooses, on lines of its own; empty for nothing.
    """

    prompt: Text
    better: str
    worse: str
    reason: str = ""


def comparisons(
    constitution: Constitution, pairs: Sequence[KnownPair], settings: PromptedSettings
) -> Iterator[Mapping[str, Any]]:
    """Supervised rows (prompt, completion): each pair, by each principle, in both orders, asked as `settings` say."""
    reason = settings.answers == "sampled"
    for pair in pairs:
        for principle in constitution.principles:
            orders = ((pair.better, pair.worse), (pair.worse, pair.better))
            for (one, other), choice in zip(orders, FIRST_OR_SECOND, strict=True):
                told = comparison(constitution, principle, pair.prompt, one, other, reason=reason)
                yield {"prompt": list(told), "completion": _answer(pair, choice)}


def rated(
    constitution: Constitution, pairs: Sequence[KnownPair], settings: PromptedSettings
) -> Iterator[Mapping[str, Any]]:
    """The same of single completions: by each principle, the better one of a pair gets `max_rating`, the worse 1."""
    top, reason = settings.max_rating, settings.answers == "sampled"
    for pair in pairs:
        for principle in constitution.principles:
            for text, worth in ((pair.better, top), (pair.worse, 1)):
                told = rating(constitution, principle, pair.prompt, text, max_rating=top, reason=reason)
                yield {"prompt": list(told), "completion": _answer(pair, str(worth))}


def _answer(pair: KnownPair, choice: str) -> str:
    return f"{pair.reason}\n{choice}" if pair.reason else choice
