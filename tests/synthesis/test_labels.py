"""AI preferences and rewards: what becomes of each pair, and what the report says of the judge."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from alignlab.config.rewards import RewardLimits
from alignlab.scoring.judges.judge import Verdict
from alignlab.scoring.judges.judge_rewards import RatingReward, WinReward
from alignlab.scoring.loading import LoadedReward
from alignlab.scoring.runner import RewardRunner
from alignlab.scoring.source_digest import source_digest
from alignlab.synthesis.labels import counts_of_rows, judge_pairs, label_report, position_bias, preferences
from tests.scoring.judges.conftest import RuledModel, rollout

Make = Callable[..., Any]


def test_pairs_become_preferences_with_their_probability(make_judge: Make) -> None:
    judge = make_judge()
    shown = [
        rollout(0, "xxx", "x"), rollout(1, "x", "xxxx"), rollout(2, "same", "same"), rollout(3, "", "x"),
        rollout(4, "mute", "x"), rollout(5, "ab", "cd"), rollout(6, "xxxxx", "xxxx"),
    ]  # fmt: skip
    rows = judge_pairs(judge, shown)
    assert [row["outcome"] for row in rows] == [
        "judged", "judged", "identical", "empty", "unanswered", "judged", "judged",
    ]  # fmt: skip
    found = preferences(rows, min_confidence=0.6)
    assert found == [
        {"prompt": "question 0", "chosen": "xxx", "rejected": "x", "probability": pytest.approx(0.75)},
        {"prompt": "question 1", "chosen": "xxxx", "rejected": "x", "probability": pytest.approx(0.8)},
    ]
    told = label_report(rows, judge.counts, min_confidence=0.6)
    assert told.num_pairs == 7 and told.confidence == pytest.approx(0.775)
    assert told.outcomes == {"labelled": 2, "identical": 1, "empty": 1, "unanswered": 1, "tie": 2}
    assert ("questions asked", "8") not in told.lines() and ("questions asked", "10") in told.lines()


class UntoldJudge:
    """Counts, and does not say what each pair came to."""

    def __init__(self, judge: Any) -> None:
        self.counts, self._judge = judge.counts, judge

    def compare(self, pairs: Any) -> list[Verdict]:
        return [Verdict(verdict.probability, verdict.by_order) for verdict in self._judge.compare(pairs)]


@pytest.mark.parametrize("told", [True, False])
def test_each_row_holds_the_counts_of_its_questions(told: bool, make_judge: Make) -> None:
    judge = make_judge()
    shown = [rollout(0, "xxx", "x"), rollout(1, "same", "same"), rollout(2, "mute", "x")]
    rows = judge_pairs(judge if told else UntoldJudge(judge), shown)
    own = [{"asked": 2, "answered": 2}, {}, {"asked": 2, "nonsense": 2, "unanswered": 2}]
    assert not told or [row["counts"] for row in rows] == own
    assert counts_of_rows(rows) == {"asked": 4, "answered": 2, "nonsense": 2, "unanswered": 2}
    rows += judge_pairs(judge if told else UntoldJudge(judge), shown[:1])
    assert counts_of_rows(rows)["asked"] == judge.counts["asked"] == 6


def test_a_position_bias_shows_in_the_report(make_judge: Make) -> None:
    """Always for the first one: the orders never agree, and the first is preferred each time."""
    rows = judge_pairs(make_judge(RuledModel(bias=5.0)), [rollout(0, "xxx", "x"), rollout(1, "x", "xx")])
    told = label_report(rows, {}, min_confidence=0.5)
    assert told.agreement == 0 and told.first_rate == 1
    assert told.outcomes == {"labelled": 2}  # the averages still tell them apart


def test_agreement_and_position_bias_by_hand() -> None:
    """Orders (first shown, second shown) of one completion: two that agree, one that favours the second place."""
    verdicts = [Verdict(None, ((0.9, 0.8), (0.2, 0.4))), Verdict(None, ((0.3, 0.7), (None, 0.9)))]
    agreement, first_rate = position_bias(verdicts)
    assert agreement == pytest.approx(2 / 3)
    assert first_rate == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert position_bias([Verdict(None)]) == (None, None)


def test_a_judge_s_ratings_are_rewards(make_judge: Make) -> None:
    reward = RatingReward(make_judge(max_rating=3))
    chat = [{"role": "assistant", "content": "xxx"}]
    assert reward(prompts=["q", "q", "q"], completions=["x", chat, "mute"]) == [0.0, 1.0, None]


def test_a_judge_reward_goes_on_counting_and_has_the_same_source_digest_in_every_run(make_judge: Make) -> None:
    first, second = (RatingReward(make_judge(max_rating=3), work=name) for name in ("one/0", "two/0"))
    source = source_digest(first)
    first(prompts=["q"], completions=["x"])
    assert source_digest(first) == source_digest(second) == source
    second.load_state(first.state())
    second(prompts=["q"], completions=["xx"])
    assert second.metrics() == {"judge/asked": 2, "judge/cached": 0, "judge/unanswered": 0}
    assert second.state() == {"counts": {"asked": 2, "answered": 2}, "calls": 2}
    assert second.judge.num_asked == 2


def test_questions_are_counted_on_where_a_run_has_another_number_of_ranks(make_judge: Make) -> None:
    states = [{"counts": {"asked": 2, "answered": 2}, "calls": 1}, {"counts": {"asked": 5}, "calls": 4}]
    for num_ranks, counts in ((1, [7]), (2, [2, 5]), (3, [2, 5, 0])):
        for rank, asked in enumerate(counts):
            rewards = RewardRunner([LoadedReward("judge", RatingReward(make_judge(max_rating=3)))], RewardLimits())
            rewards.load_state_of_ranks([{"judge": state} for state in states], rank, num_ranks)
            assert rewards.metrics()["judge/asked"] == asked
            if num_ranks != len(states):
                assert rewards.state()["judge"]["calls"] == 4, "names of calls that no rank has used"
            rewards.close()


def test_the_mean_win_probability_in_a_group_is_a_reward(make_judge: Make) -> None:
    """Lengths 1, 3, 6 and nothing: 1 loses to 3 by 1/4 and to 6 by 1/7, and beats the empty one."""
    judge = make_judge()
    texts = ["x", "xxx", "xxxxxx", " "]
    won = WinReward(judge)(prompts=["p"] * 4 + ["q"] * 2, completions=[*texts, "ab", "ab"])
    assert won[:4] == pytest.approx([
        (1 / 4 + 1 / 7 + 1) / 3, (3 / 4 + 1 / 3 + 1) / 3, (6 / 7 + 2 / 3 + 1) / 3, 0.0,
    ])  # fmt: skip
    assert won[4:] == [0.5, 0.5] and judge.counts["asked"] == 6


def test_a_completion_without_a_judged_pair_has_no_reward(make_judge: Make) -> None:
    won = WinReward(make_judge())(prompts=["p"] * 2 + ["q"] * 3, completions=["mute", "x", "mute", "x", "xxx"])
    assert won[:3] == [None, None, None]
    assert won[3:] == pytest.approx([0.25, 0.75]) and not any(isinstance(w, float) and math.isnan(w) for w in won)
