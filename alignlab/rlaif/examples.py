"""Questions to a judge with their right answers, to teach or to test one by pairs whose better completion is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignlab.config.constitution import Constitution
from alignlab.rlaif.questions import FIRST_OR_SECOND, comparison, rating
from alignlab.types import Text


def comparisons(constitution: Constitution, pairs: Sequence[tuple[Text, str, str]]) -> Iterator[Mapping[str, Any]]:
    """Supervised rows (prompt, completion): each pair (prompt, better, worse), by each principle, in both orders."""
    for prompt, good, bad in pairs:
        for principle in constitution.principles:
            for one, other, right in ((good, bad, FIRST_OR_SECOND[0]), (bad, good, FIRST_OR_SECOND[1])):
                told = comparison(constitution, principle, prompt, one, other, reason=False)
                yield {"prompt": list(told), "completion": right}


def rated(
    constitution: Constitution, pairs: Sequence[tuple[Text, str, str]], *, max_rating: int
) -> Iterator[Mapping[str, Any]]:
    """The same of single completions: by each principle, the better one of a pair gets `max_rating`, the worse 1."""
    for prompt, good, bad in pairs:
        for principle in constitution.principles:
            for text, worth in ((good, max_rating), (bad, 1)):
                told = rating(constitution, principle, prompt, text, max_rating=max_rating, reason=False)
                yield {"prompt": list(told), "completion": str(worth)}
