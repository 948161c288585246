"""Columns that rewards need and data lack, found before anything is generated."""

import logging
from typing import Any

import pytest
from alignlab_rewards.combine import combine
from alignlab_rewards.exact_match import exact_match
from alignlab_rewards.length import length
from alignlab_rewards.math_answer import math_answer
from alignlab_rewards.regex_format import regex_format

from alignlab.errors import ConfigError
from alignlab.training.reward_columns import check_columns, reward_columns
from alignlab.training.reward_functions import LoadedReward
from alignlab.types import Prompt

ROWS = [Prompt((1,), "q", i, {"answer": "x", "prompt": "q", "task": "t"}) for i in range(3)]


def needs(completions: list[str], ground_truth: list[str]) -> list[float]:
    raise AssertionError("a function that is not ours is not called")


def check(function: Any, prompts: Any = ROWS, **options: Any) -> None:
    check_columns([LoadedReward("own", function, options=options)], prompts, data="the training data")


def test_columns_are_those_that_a_reward_receives() -> None:
    assert reward_columns([*ROWS, Prompt((1,), "q", 3, {"tests": 1})]) == ("answer", "task", "tests")


def test_a_missing_column_names_the_column_and_those_that_exist() -> None:
    with pytest.raises(ConfigError, match=r"'own' requires ground_truth, and the training data has only answer, task;"):
        check(needs)
    check(needs, ground_truth="as an option")
    check(needs, [Prompt((1,), "q", 0, {"ground_truth": 1})])


@pytest.mark.parametrize(
    ("function", "near"),
    [
        (lambda completions, answers: [], "requires answers, .*did you mean answer"),
        (lambda completion, **columns: [], "requires completion, .*did you mean completions"),
        (lambda completions, trainer_state: [], "which TRL passes and alignlab does not; give it a default"),
    ],
)
def test_the_nearest_name_is_offered(function: Any, near: str) -> None:
    with pytest.raises(ConfigError, match=near):
        check(function)


def test_arguments_that_every_call_has_and_defaults_are_no_columns() -> None:
    check(lambda prompts, completions, completion_ids, prompt_ids, gold=None, **columns: [])
    check(print)
    made: dict[str, Any] = {"__name__": None}
    exec("def reward(completions, **columns): raise AssertionError", made)
    check(made["reward"])


def test_a_column_of_some_rows_alone_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ROWS, Prompt((1,), "q", 7, {"ground_truth": 1})]
    with caplog.at_level(logging.WARNING):
        check(needs, rows)
    [message] = [record.getMessage() for record in caplog.records]
    assert "the column 'ground_truth', which 3 of 4 rows of the training data do not have, first row 0" in message


@pytest.mark.parametrize(
    ("function", "options", "named"),
    [
        (math_answer, {}, "'own' cannot score the training data, whose columns are task: .*'answer' or 'solution'"),
        (combine, {"parts": {"exact_match": 1.0}}, "exact_match, a part of combine, requires answer"),
        (combine, {"parts": {"exact_mach": 1.0}}, "'exact_mach' that is not installed"),
        (combine, {"parts": {"length": {"max_token": 3}}}, "length, a part of combine, has no option 'max_token'"),
        (regex_format, {"pattern": "("}, "unterminated"),
        (length, {"falloff_tokens": 0}, "falloff_tokens >= 1"),
        (exact_match, {}, "requires answer"),
    ],
)
def test_a_shipped_reward_that_could_never_work_is_refused(function: Any, options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(function, [Prompt((1,), "q", 0, {"task": "t"})], **options)


def test_shipped_rewards_that_can_work_are_let_through() -> None:
    check(math_answer)
    check(combine, parts={"exact_match": 1.0, "length": {"weight": 0.5, "max_tokens": 4}})
    check(regex_format, pattern=".*")


def test_a_required_column_that_holds_nothing_is_refused():
    prompts = [Prompt((1,), "q", i, {"answer": None}) for i in range(3)]
    with pytest.raises(ConfigError, match="requires answer, and this column holds nothing in all 3 rows of the train"):
        check(exact_match, prompts)


def test_columns_named_as_arguments_of_the_call_are_said(caplog):
    check_columns([], [Prompt((1,), "q", 0, {"completion_ids": "mine", "answer": "1"})], data="the data")
    assert "the columns completion_ids of the data do not reach the rewards" in caplog.text
