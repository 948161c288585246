from __future__ import annotations

import math
from typing import Any

import pytest

from alignlab.errors import ConfigError, RewardError
from alignlab.evaluation.strategies import graded
from alignlab.evaluation.strategies.graded import AnswerReader, grade, sampled_logprobs
from alignlab.evaluation.strategies.pool import Pool
from alignlab.scoring.loading import LoadedReward
from alignlab.types import Completion, Prompt, Rollout


def last_word(completions: list[str], answer: list[Any], **columns: Any) -> list[float | None]:
    return [
        None if expected is None else float(text.split()[-1:] == [str(expected)])
        for text, expected in zip(completions, answer, strict=True)
    ]


def read_last(text: str, *, case: bool = True) -> str | None:
    words = text.split() if case else text.casefold().split()
    return words[-1] if words else None


last_word.read_answer = read_last  # type: ignore[attr-defined]


def pool(*problems: tuple[Any, list[str]]) -> Pool:
    return Pool(
        {},
        tuple(
            Rollout(Prompt((row,), "?", row, {"answer": answer}), tuple(
                Completion.of((1, 2), text, logprobs=(-1.0, -3.0)) for text in texts
            ))
            for row, (answer, texts) in enumerate(problems)
        ),
    )  # fmt: skip


SCORER = LoadedReward("last_word", last_word)


def test_samples_are_graded_by_hand():
    def lengths(completions: list[str], **columns: Any) -> list[float | None]:
        return [None if not text else float(len(text)) for text in completions]

    [problem] = grade(
        pool(("4", ["it is 4", "5", "", "4"])), SCORER, reader=AnswerReader(SCORER),
        rewards={"long": LoadedReward("lengths", lengths)},
    )
    assert problem.right == (1.0, 0.0, 0.0, 1.0) and problem.answers == (0, 1, None, 0)
    assert problem.scores["long"] == (7.0, 1.0, -math.inf, 1.0) and problem.scores["logprob"] == (-2.0,) * 4
    assert problem.votes() == [(2, 1.0), (1, 0.0)] and problem.tokens == (2,) * 4


def test_problems_that_the_scorer_does_not_apply_to_are_left_out():
    graded = grade(pool(("4", ["4"]), (None, ["4"]), ("5", ["4"])), SCORER)
    assert [problem.row for problem in graded] == [0, 2]
    with pytest.raises(RewardError, match="gave None for each of 1"):
        grade(pool((None, ["4"])), SCORER)


def test_options_of_the_reward_reach_its_reader():
    assert AnswerReader(SCORER).numbers(["Red", "red"]) == (0, 1)
    without_case = LoadedReward("last_word", last_word, options={"case": False, "other": 1})
    assert AnswerReader(without_case).numbers(["Red", "red", ""]) == (0, 0, None)


def test_a_reward_may_say_which_answers_are_one():
    class Near:
        def read_answer(self, text: str) -> str | None:
            return text or None

        def same_answer(self, answer: str, other: str) -> bool:
            return int(answer) == int(other) + 1  # one way round only

        def __call__(self, completions: list[str], **columns: Any) -> list[float]:
            return [0.0] * len(completions)

    assert AnswerReader(LoadedReward("near", Near())).numbers(["1", "2", "9", "8", "1"]) == (0, 0, 1, 1, 0)


def test_votes_without_a_way_to_read_answers_are_refused():
    def mute(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(ConfigError, match=r"mute has no attribute read_answer; use math_answer.*mute.read_answer = "):
        AnswerReader(LoadedReward("mute", mute))


@pytest.mark.parametrize(("read", "message"), [(lambda text: text[9], "IndexError"), (len, "returned int for")])
def test_a_reader_that_fails_is_named(read, message):
    def mine(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    mine.read_answer = read  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match=f"mine.read_answer must return.*{message}"):
        AnswerReader(LoadedReward("mine", mine)).numbers(["abc"])


def test_a_large_pool_is_scored_in_several_calls(monkeypatch):
    calls = []

    def counting(completions: list[str], **columns: Any) -> list[float]:
        calls.append(len(completions))
        return [float(text == "4") for text in completions]

    monkeypatch.setattr(graded, "SAMPLES_A_CALL", 3)
    of_all = grade(pool(*[("4", ["4", "5"])] * 5), LoadedReward("counting", counting))
    assert calls == [4, 4, 2] and [problem.right for problem in of_all] == [(1.0, 0.0)] * 5


def test_a_reward_that_fails_is_an_error_and_no_low_score():
    def broken(completions: list[str], **columns: Any) -> list[float]:
        raise ZeroDivisionError

    with pytest.raises(RewardError, match="must not fail"):
        grade(pool(("4", ["4"])), SCORER, rewards={"broken": LoadedReward("broken", broken)})


def test_log_probs_are_the_model_s_own_and_of_its_own_tokens():
    completion = Completion.of((1, 2, 3), logprobs=(-1.0, -2.0, -3.0), raw_logprobs=(-4.0, -5.0, -6.0))
    assert sampled_logprobs(completion) == (-4, -5, -6)
    forced = Completion.of((1, 2, 3), logprobs=(-1.0, 0.0, -3.0), writers=("policy", "user", "policy"))
    assert sampled_logprobs(forced) == (-1, -3)
