"""A judge's opinion as a reward: of each completion alone, or against the others of its prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import fmean

from alignlab.rlaif.judge import Judge
from alignlab.training.reward_calls import CallerReward
from alignlab.types import Text, message_text


class RatingReward(CallerReward):
    """The judge's rating of each completion, in [0, 1] (direct RLAIF, arXiv:2309.00267, Sec. 2.2.2)."""

    def __init__(self, judge: Judge) -> None:
        self.__name__ = "judge_rating"
        self.judge = judge

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """One rating a completion; None where the judge gave none."""
        texts = [message_text(completion) for completion in completions]
        return self.judge.rate(list(zip(prompts, texts, strict=True)))


class WinReward(CallerReward):
    """How probably each completion is better than another of its prompt, on average, in [0, 1].

    Completions of one prompt are those that follow each other with an equal prompt. Equal texts are worth one half,
    and an empty one loses.
    """

    def __init__(self, judge: Judge) -> None:
        self.__name__ = "judge_win"
        self.judge = judge

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """One rate a completion; None where the judge had no opinion on any of its pairs."""
        texts = [message_text(completion) for completion in completions]
        groups = [list(group) for _, group in itertools.groupby(range(len(texts)), key=lambda i: str(prompts[i]))]
        pairs = [pair for group in groups for pair in itertools.combinations(group, 2)]
        asked = [(i, j) for i, j in pairs if texts[i] != texts[j] and texts[i].strip() and texts[j].strip()]
        verdicts = self.judge.compare([(prompts[i], texts[i], texts[j]) for i, j in asked])
        known = {pair: verdict.probability for pair, verdict in zip(asked, verdicts, strict=True)}
        wins: list[list[float | None]] = [[] for _ in texts]
        for i, j in pairs:
            probability = known[i, j] if (i, j) in known else _unasked(texts[i], texts[j])
            wins[i].append(probability)
            wins[j].append(None if probability is None else 1 - probability)
        return [fmean(own) if (own := [p for p in each if p is not None]) else None for each in wins]


def _unasked(one: str, other: str) -> float:
    """Of a pair that shows what it is worth."""
    return 0.5 if bool(one.strip()) == bool(other.strip()) else float(bool(one.strip()))
