"""Questions to a judge with their right answers, to teach or to test one by pairs whose better completion is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignlab.config.constitution import Constitution
from alignlab.rlaif.questions import FIRST_OR_SECOND, comparison, rating
from alignlab.types import Text


def judge_examples(
    constitution: Constitution, pairs: Sequence[tuple[Text, str, str]], *, max_rating: int
) -> Iterator[Mapping[str, Any]]:
    """Supervised rows (prompt, completion): each pair by each principle, in both orders, and each completion rated.

    Args:
        pairs: (prompt, better completion, worse completion).
        max_rating: that the better one gets; the worse one gets 1.
    """
    first, second = FIRST_OR_SECOND
    for prompt, good, bad in pairs:
        for principle in constitution.principles:
            for one, other, right in ((good, bad, first), (bad, good, second)):
                told = comparison(constitution, principle, prompt, one, other, reason=False)
                yield {"prompt": list(told), "completion": right}
            for text, worth in ((good, max_rating), (bad, 1)):
                told = rating(constitution, principle, prompt, text, max_rating=max_rating, reason=False)
                yield {"prompt": list(told), "completion": str(worth)}
