"""The judge: both orders, votes, ratings, answers kept, questions counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignlab.config.judge import ModelJudge
from alignlab.errors import ConfigError, JudgeError
from alignlab.scoring.judges.answer_cache import AnswerStore
from alignlab.scoring.judges.asking import normalised
from alignlab.scoring.judges.chat_model import Failure
from alignlab.scoring.judges.judge import expected_rating
from alignlab.scoring.judges.make_judge import make_judge as judge_of_settings
from alignlab.scoring.judges.questions import chosen, ratings
from tests.scoring.judges.conftest import CONSTITUTION, RuledModel, shown

Make = Callable[..., Any]


def test_probabilities_are_normalised_over_the_choices() -> None:
    assert normalised([-1.0, -1.0]) == [0.5, 0.5]
    assert normalised([-1000.0, -1000.0 - 1.0986122886681098]) == pytest.approx([0.75, 0.25])


def test_an_expected_rating_runs_from_0_to_1() -> None:
    assert expected_rating([1, 0, 0]) == 0 and expected_rating([0, 0, 1]) == 1
    assert expected_rating([0.5, 0.25, 0.25]) == pytest.approx(0.375)


def test_both_orders_are_averaged_and_a_bias_for_the_first_cancels(make_judge: Make) -> None:
    """Lengths 6 and 2: 0.75 without a bias. With log 3 for whatever is first: 18/20 and 6/12."""
    [plain] = make_judge().compare([("q", "xxxxxx", "xx")])
    assert plain.probability == pytest.approx(0.75) and plain.by_order == (pytest.approx((0.75, 0.75)),)
    [biased] = make_judge(RuledModel(bias=1.0986122886681098)).compare([("q", "xxxxxx", "xx")])
    assert biased.by_order == (pytest.approx((0.9, 0.5)),) and biased.probability == pytest.approx(0.7)
    [equal] = make_judge(RuledModel(bias=3.0)).compare([("q", "xxx", "yyy")])
    assert equal.probability == pytest.approx(0.5)


def test_votes_are_by_different_principles_the_same_for_the_same_pair(make_judge: Make) -> None:
    model = RuledModel()
    make_judge(model, votes=3).compare([("q", "one", "other")])
    names = [next(p.name for p in CONSTITUTION.principles if p.prefer in str(q[0]["content"])) for q in model.asked]
    assert len(names) == 6 and names[0::2] == names[1::2] and set(names) == {"long", "odd", "calm"}
    again = RuledModel()
    make_judge(again, votes=3).compare([("q", "other", "one")])
    assert [str(q) for q in again.asked[1::2]] == [str(q) for q in model.asked[0::2]]


def test_a_rating_is_the_expectation_over_the_choices(make_judge: Make) -> None:
    judge = make_judge(max_rating=5)
    assert judge.rate([("q", "x"), ("q", "xxx"), ("q", "xxxxx")]) == pytest.approx([0.0, 0.5, 1.0])


def test_nonsense_gives_no_answer_and_is_counted(make_judge: Make) -> None:
    judge = make_judge()
    silent, plain = judge.compare([("q", "mute", "x"), ("q", "xx", "x")])
    assert silent.probability is None and plain.probability == pytest.approx(2 / 3)
    assert judge.rate([("q", "mute")]) == [None]
    assert judge.counts["nonsense"] == judge.counts["unanswered"] == 3


def test_sampled_answers_are_votes_and_nonsense_is_asked_again(make_judge: Make) -> None:
    """Votes: (1, 2) both for the first; then nonsense once, mended by the second attempt, for the second."""
    model = RuledModel(texts=["Well,\n1", "I say:\n2", "hm", "so: 1", "2"])
    judge = make_judge(model, answers="sampled", votes=2)
    [verdict] = judge.compare([("q", "a", "b")])
    assert verdict.by_order == ((1.0, 1.0), (0.0, 0.0)) and verdict.probability == 0.5
    assert judge.counts["nonsense"] == 1 and judge.counts["unanswered"] == 0 and judge.counts["asked"] == 5


def test_a_sampled_answer_that_stays_nonsense_is_none(make_judge: Make) -> None:
    judge = make_judge(RuledModel(texts=["?"] * 6), answers="sampled", max_attempts=3)
    [verdict] = judge.compare([("q", "a", "b")])
    assert verdict.probability is None and judge.counts["asked"] == 6 and judge.counts["unanswered"] == 2


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("2", 1), ("Answer 1 is bad. So: 2", 1), ("because\n **2**.\n\n", 1), ("2, and not 1.", None), ("12", None),
        ("1.5", None), ("", None), ("x1", None), ("Answer 2 is better than Answer 1.", None), ("2 > 1", None),
    ],
)
def test_the_choice_alone_on_the_last_line_counts(text: str, place: int | None) -> None:
    assert chosen(text, ("1", "2")) == place


@pytest.mark.parametrize(
    ("text", "rating"),
    [("7", 7), ("Rating: 7/9", 7), ("good\nRating: **7** out of 9.", 7), ("7 (1 = worst, 9 = best)", None), ("9/9", 9)],
)
def test_the_scale_beside_a_rating_is_not_read_as_the_rating(text: str, rating: int | None) -> None:
    assert chosen(text, ratings(9)) == (None if rating is None else rating - 1)


def test_a_stored_answer_counts_as_asked_for_the_same_work_and_as_cached_for_other_work(
    make_judge: Make, tmp_path: Path
) -> None:
    """The first sample is nonsense: 3 attempts for the 2 questions of the pair."""
    def judge(*texts: str) -> Any:
        store = AnswerStore(tmp_path / "answers.sqlite")
        return make_judge(RuledModel(texts=texts), answers="sampled", store=store)

    pairs = [("q", "a", "b")]
    first = judge("hm", "1", "2")
    verdicts = first.compare(pairs, work=["run/0"])
    counts = {"asked": 3, "answered": 2, "nonsense": 1}
    assert +first.counts == counts
    again = judge()
    assert again.compare(pairs, work=["run/0"]) == verdicts and +again.counts == counts
    for work in (["run/1"], []):
        other = judge()
        assert other.compare(pairs, work=work) == verdicts and +other.counts == {"cached": 2}
    twice = judge()
    twice.compare(pairs * 2, work=["run/0", "run/1"])
    assert +twice.counts == counts | {"cached": 2}


class PickyModel(RuledModel):
    """Refuses one question; what it does with the others is told by `kind`."""

    kind: Any = None

    def choose(self, conversations: Any, choices: Any) -> list[Any]:
        answers = super().choose(conversations, choices)
        return [
            Failure("refused", "too long") if "long" in shown(c) else Failure(self.kind, "down") if self.kind else one
            for c, one in zip(conversations, answers, strict=True)
        ]


def test_a_refused_question_leaves_the_others_answered(make_judge: Make, tmp_path: Path) -> None:
    """Nor where all others are known, or there are none."""
    store = AnswerStore(tmp_path / "answers.sqlite")
    for _ in range(2):
        judge = make_judge(PickyModel(), store=store)
        assert judge.rate([("q", "xx"), ("q", "long")]) == [pytest.approx(0.125), None]
    assert make_judge(PickyModel()).rate([("q", "long")]) == [None]


def test_a_judge_that_is_down_is_an_error_unless_some_answers_are_stored(make_judge: Make, tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    make_judge(store=store).rate([("q", "xx")])
    down = PickyModel()
    down.kind = "timeout"
    assert make_judge(down, store=store).rate([("q", "xx"), ("q", "xxx")]) == [pytest.approx(0.125), None]
    with pytest.raises(JudgeError, match=r"answered none of 1 questions, .*: down"):
        make_judge(down, store=store).rate([("q", "xxx")])


def test_a_timeout_is_not_asked_again_by_the_judge(make_judge: Make) -> None:
    """Only nonsense is sampled anew: the endpoint has its own patience."""
    judge = make_judge(RuledModel(texts=["1", Failure("timeout", "late")]), answers="sampled", max_attempts=3)
    [verdict] = judge.compare([("q", "a", "b")])
    assert verdict.probability is None and judge.counts["asked"] == 2 and judge.counts["unanswered"] == 1


def test_a_preference_by_rounding_alone_is_one_half(make_judge: Make) -> None:
    class Rounding(RuledModel):
        def _choose(self, answers: list[str], choices: Any) -> Any:
            return (1e-7 if answers[0] < answers[1] else 0.0), 0.0

    [verdict] = make_judge(Rounding()).compare([("q", "a", "b")])
    assert verdict.probability == 0.5 and verdict.by_order[0][0] != 0.5


def test_stored_answers_are_not_asked_again(make_judge: Make, tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "a" / "answers.sqlite")
    pairs = [("q", "xxx", "x"), ("q", "x", "xxxx")]
    first = make_judge(store=store)
    verdicts = first.compare(pairs)
    assert first.counts["asked"] == 4 and first.counts["cached"] == 0
    second = make_judge(RuledModel(bias=9.0), store=AnswerStore(tmp_path / "a" / "answers.sqlite"), max_questions=1)
    assert second.compare(pairs) == verdicts and second.counts["asked"] == 0 and second.counts["cached"] == 4
    # The same pair the other way round is the same two questions.
    assert second.compare([("q", "x", "xxx")])[0].probability == pytest.approx(0.25)


def test_a_stored_answer_of_another_model_or_question_is_not_used(make_judge: Make, tmp_path: Path) -> None:
    store = AnswerStore(tmp_path / "answers.sqlite")
    make_judge(store=store).rate([("q", "xx")])
    other = RuledModel()
    other.identity = "another"
    for judge in (make_judge(other, store=store), make_judge(store=store, max_rating=3)):
        judge.rate([("q", "xx")])
        assert judge.counts["cached"] == 0


def test_questions_over_the_budget_are_not_asked_and_are_counted(make_judge: Make) -> None:
    judge = make_judge(max_questions=2)
    known, unknown = judge.compare([("q", "xx", "x"), ("q", "xxx", "x")])
    assert known.probability == pytest.approx(2 / 3) and unknown.probability is None
    assert judge.counts["asked"] == 2 and judge.counts["over_budget"] == 2


class DownModel(RuledModel):
    def choose(self, conversations: Any, choices: Any) -> list[Any]:
        return [Failure("unreachable", "connection refused")] * len(conversations)


def test_a_judge_that_answers_nothing_at_all_is_an_error(make_judge: Make) -> None:
    with pytest.raises(JudgeError, match=r"answered none of 2 questions.*connection refused.*--resume"):
        make_judge(DownModel()).compare([("q", "a", "b")])


def test_more_votes_than_principles_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match=r"judge\.votes is 4, and must be at most the 3 principles of test"):
        judge_of_settings(ModelJudge(votes=4), CONSTITUTION)
    with pytest.raises(ConfigError, match=r"judge\.name is not given, and there is no policy"):
        judge_of_settings(ModelJudge(), CONSTITUTION)
