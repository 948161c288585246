"""A judge as a reward: its rating of each completion, or its comparisons with the others of the prompt."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from alignlab.errors import JudgeError
from alignlab.scoring.calls import InlineReward
from alignlab.scoring.judges.judge import Judge, PromptedJudge, count_earlier_questions
from alignlab.types import Text, message_text

_Answers = TypeVar("_Answers")


@dataclass
class _Calls:
    """Calls of a reward. An object of its own, since plain attributes of a reward are part of its source digest.

    Attributes:
        work: name of the run and the rank.
        num_done: calls in the whole run.
    """

    work: str
    num_done: int = 0


class JudgeReward(InlineReward):
    """The budget and the counts of questions of a reward by a judge; a resumed run goes on with both.

    Args:
        judge: the judge.
        work: name of the run and the rank, so that a killed and resumed run counts the same questions; see
            `PromptedJudge`.

    Attributes:
        counts: questions of this rank's calls in all starts, by outcome, see `PromptedJudge.counts`; a call that failed
            and was repeated counts once.
    """

    def __init__(self, judge: Judge, *, work: str = "") -> None:
        self.judge, self._calls = judge, _Calls(work)
        self.counts: Counter[str] = Counter()

    def metrics(self) -> dict[str, float]:
        """Return the questions so far, by outcome."""
        return {f"judge/{name}": float(self.counts[name]) for name in ("asked", "cached", "unanswered")}

    def state(self) -> dict[str, Any]:
        """Return the counts and the number of calls."""
        return {"counts": dict(self.counts), "calls": self._calls.num_done}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore the result of `state`."""
        self.counts, self._calls.num_done = Counter(state["counts"]), state["calls"]
        count_earlier_questions(self.judge, self.counts)

    def joined(self, states: Sequence[Mapping[str, Any]], all_states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the questions of the earlier ranks, and a number of calls that none of them has reached."""
        counts = sum((Counter(state["counts"]) for state in states), Counter())
        return {"counts": dict(counts), "calls": max(state["calls"] for state in all_states)}

    def work_names(self, count: int) -> dict[str, Any]:
        """Return the argument `work` for a call of the judge on `count` items; none if the judge does not take it."""
        calls = self._calls
        is_named = calls.work and isinstance(self.judge, PromptedJudge)
        return {"work": [f"{calls.work}/{calls.num_done}"] * count} if is_named else {}

    def within_budget(self, call_judge: Callable[[], _Answers]) -> _Answers:
        """Return the result of `call_judge`, and count its questions.

        Raises:
            JudgeError: the budget left a question out; the policy must not learn on without its reward.
        """
        judge, before = self.judge, Counter(self.judge.counts)
        answers = call_judge()
        if judge.counts["over_budget"] > before["over_budget"]:
            num_asked = judge.num_asked if isinstance(judge, PromptedJudge) else judge.counts["asked"]
            raise JudgeError(
                f"the judge has been asked {num_asked} questions, which is judge.max_questions; raise it, and go on "
                "with --resume"
            )
        self.counts += judge.counts - before
        self._calls.num_done += 1
        return answers


class RatingReward(JudgeReward):
    """The judge's rating of each completion, in [0, 1] (direct RLAIF, arXiv:2309.00267, Sec. 2.2.2)."""

    __name__ = "judge_rating"

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """Return one rating a completion; None where the judge gave none."""
        texts = [message_text(completion) for completion in completions]
        answers = list(zip(prompts, texts, strict=True))
        return self.within_budget(lambda: self.judge.rate(answers, **self.work_names(len(answers))))


class WinReward(JudgeReward):
    """The mean probability that a completion is better than another one of its prompt, in [0, 1].

    Consecutive completions with an equal prompt belong together. Equal texts count one half each, and an empty text
    loses.
    """

    __name__ = "judge_win"

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """Return one mean a completion; None where the judge answered about none of its pairs."""
        texts = [message_text(completion) for completion in completions]
        wins: list[list[float]] = [[] for _ in texts]
        for (i, j), probability in self._probabilities(prompts, texts).items():
            if probability is not None:
                wins[i].append(probability)
                wins[j].append(1 - probability)
        return [fmean(of_completion) if of_completion else None for of_completion in wins]

    def _probabilities(self, prompts: Sequence[Text], texts: Sequence[str]) -> dict[tuple[int, int], float | None]:
        """Return, for each pair of one prompt, the probability that its first completion is the better one."""
        groups = itertools.groupby(range(len(texts)), key=lambda i: str(prompts[i]))
        pairs = {pair: _evident(texts, pair) for _, group in groups for pair in itertools.combinations(group, 2)}
        to_judge = [pair for pair, probability in pairs.items() if probability is None]
        questions = [(prompts[i], texts[i], texts[j]) for i, j in to_judge]
        verdicts = self.within_budget(lambda: self.judge.compare(questions, **self.work_names(len(questions))))
        return pairs | {pair: verdict.probability for pair, verdict in zip(to_judge, verdicts, strict=True)}


def _evident(texts: Sequence[str], pair: tuple[int, int]) -> float | None:
    """Return the probability of a pair of equal texts or with an empty one; None for a pair that has to be judged."""
    first, second = (texts[i] for i in pair)
    if first == second:
        return 0.5
    first_is_written, second_is_written = bool(first.strip()), bool(second.strip())
    if first_is_written and second_is_written:
        return None
    return 0.5 if first_is_written == second_is_written else float(first_is_written)
