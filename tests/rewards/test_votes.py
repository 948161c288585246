"""How the shipped rewards read an answer for votes."""

from __future__ import annotations

import pytest
from alignlab_rewards.exact_match import exact_match
from alignlab_rewards.math_answer import math_answer
from alignlab_rewards.reasoning_gym_answer import reasoning_gym_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [("so it is 1,000.", "1000"), ("7.0", "7"), ("-3", "-3"), ("0.5 of it", "1/2"), ("none", None), ("", None)],
)
def test_the_last_number_votes_by_its_value(text, answer):
    assert reasoning_gym_answer.read_answer(text) == answer


def test_tagged_and_whole_answers_are_read_as_they_are_scored():
    assert reasoning_gym_answer.read_answer("3 <answer> red </answer> 4", extract="tagged") == "red"
    assert reasoning_gym_answer.read_answer(" 3 apples ", extract="whole") == "3 apples"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First 3. So \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        ("The answer is 12.", "12"),
        ("It is 12", "12"),
        ("<think>5</think> So 7", "7"),
        ("<think>5", None),
        ("", None),
    ],
)
def test_a_mathematical_answer_is_read_where_it_is_scored(text, answer):
    assert math_answer.read_answer(text) == answer


def test_options_say_where_the_thinking_ends():
    assert math_answer.read_answer("<think> The answer is 5.", thinking="keep") == "5"
    assert math_answer.read_answer("7", thinking="required") is None


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(r"\frac{1}{2}", "0.5", True), ("x+1", "1+x", True), ("7", "8", False), ("7.0", "7", True), ("red", "Red", True)],
)
def test_answers_that_the_reward_takes_for_equal_are_one(one, other, same):
    assert math_answer.same_answer(one, other) is same


def test_a_whole_text_votes_without_white_space():
    assert exact_match.read_answer(" Red\n") == "Red" and exact_match.read_answer("  ") is None
    assert exact_match.read_answer("Red", ignore_case=True) == "red"
