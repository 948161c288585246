"""A judge's opinion as a reward: of each completion alone, or against the others of its prompt."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

from alignlab.errors import JudgeError
from alignlab.rlaif.judge import Judge, PromptedJudge, take_earlier
from alignlab.training.reward_calls import CallerReward
from alignlab.types import Text, message_text

_Answers = TypeVar("_Answers")


@dataclass
class _Calls:
    """Of a reward, as a thing of its own: what a reward holds itself tells it from another when a run goes on.

    Attributes:
        work: names the run and the rank.
        num_done: in the whole run.
    """

    work: str
    num_done: int = 0


class JudgeReward(CallerReward):
    """What rewards by a judge have in common: the budget, and counts of questions, which go on with a resumed run.

    Args:
        work: names the run and the rank, for counts that are the same whether or not it is killed; see `PromptedJudge`.

    Attributes:
        counts: of the questions of this rank's calls, see `PromptedJudge.counts`, those of earlier starts among them;
            of a call that fails, or that a resumed run makes once more, only those of the last time.
    """

    def __init__(self, judge: Judge, *, work: str = "") -> None:
        self.judge, self._calls = judge, _Calls(work)
        self.counts: Counter[str] = Counter()

    def metrics(self) -> dict[str, float]:
        """What became of the questions so far."""
        return {f"judge/{name}": float(self.counts[name]) for name in ("asked", "cached", "unanswered")}

    def state(self) -> dict[str, Any]:
        """The counts, and how many calls there were."""
        return {"counts": dict(self.counts), "calls": self._calls.num_done}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Count on from where `state` was taken."""
        self.counts, self._calls.num_done = Counter(state["counts"]), state["calls"]
        take_earlier(self.judge, self.counts)

    def work_of(self, shown: Sequence[Any]) -> dict[str, Any]:
        """The arguments that tell the judge what each of the shown is judged for, where it takes any."""
        calls = self._calls
        named = calls.work and isinstance(self.judge, PromptedJudge)
        return {"work": [f"{calls.work}/{calls.num_done}"] * len(shown)} if named else {}

    def within_budget(self, ask: Callable[[], _Answers]) -> _Answers:
        """What `ask` returns, its questions counted.

        Raises:
            JudgeError: the budget left a question out: a policy does not learn on without its reward.
        """
        judge, before = self.judge, Counter(self.judge.counts)
        answers = ask()
        if judge.counts["over_budget"] > before["over_budget"]:
            asked = judge.num_asked if isinstance(judge, PromptedJudge) else judge.counts["asked"]
            raise JudgeError(
                f"the judge has been asked {asked} questions, which is judge.max_questions; raise it, and go on with "
                "--resume"
            )
        self.counts += judge.counts - before
        self._calls.num_done += 1
        return answers


class RatingReward(JudgeReward):
    """The judge's rating of each completion, in [0, 1] (direct RLAIF, arXiv:2309.00267, Sec. 2.2.2)."""

    __name__ = "judge_rating"

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """One rating a completion; None where the judge gave none."""
        texts = [message_text(completion) for completion in completions]
        shown = list(zip(prompts, texts, strict=True))
        return self.within_budget(lambda: self.judge.rate(shown, **self.work_of(shown)))


class WinReward(JudgeReward):
    """How probably each completion is better than another of its prompt, on average, in [0, 1].

    Completions of one prompt are those that follow each other with an equal prompt. Equal texts are worth one half,
    and an empty one loses.
    """

    __name__ = "judge_win"

    def __call__(self, *, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
        """One rate a completion; None where the judge had no opinion on any of its pairs."""
        texts = [message_text(completion) for completion in completions]
        wins: list[list[float]] = [[] for _ in texts]
        for (i, j), probability in self._probabilities(prompts, texts).items():
            if probability is not None:
                wins[i].append(probability)
                wins[j].append(1 - probability)
        return [fmean(own) if own else None for own in wins]

    def _probabilities(self, prompts: Sequence[Text], texts: Sequence[str]) -> dict[tuple[int, int], float | None]:
        """Of each pair of one prompt, that its first completion is the better one."""
        groups = itertools.groupby(range(len(texts)), key=lambda i: str(prompts[i]))
        found = {pair: _plain(texts, pair) for _, group in groups for pair in itertools.combinations(group, 2)}
        asked = [pair for pair, known in found.items() if known is None]
        shown = [(prompts[i], texts[i], texts[j]) for i, j in asked]
        verdicts = self.within_budget(lambda: self.judge.compare(shown, **self.work_of(shown)))
        return found | {pair: verdict.probability for pair, verdict in zip(asked, verdicts, strict=True)}


def counts_of_rewards(functions: Sequence[object]) -> Counter[str]:
    """What became of the questions of those that are rewards by a judge, on this rank."""
    return sum((each.counts for each in functions if isinstance(each, JudgeReward)), Counter[str]())


def _plain(texts: Sequence[str], pair: tuple[int, int]) -> float | None:
    """The probability of a pair that shows what it is worth; None of one that has to be judged."""
    one, other = (texts[i] for i in pair)
    if one == other:
        return 0.5
    written, also = bool(one.strip()), bool(other.strip())
    if written and also:
        return None
    return 0.5 if written == also else float(written)
