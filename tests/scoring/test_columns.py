"""Columns that rewards need and data lack, found before anything is generated."""

import logging
from typing import Any

import pytest
from alignlab_rewards.combine import combine
from alignlab_rewards.exact_match import exact_match
from alignlab_rewards.length import length
from alignlab_rewards.math_answer import math_answer
from alignlab_rewards.reasoning_gym_answer import reasoning_gym_answer
from alignlab_rewards.regex_format import regex_format
from alignlab_rewards.repetition import repetition

from alignlab.errors import ConfigError
from alignlab.scoring.columns import check_columns, reward_columns
from alignlab.scoring.loading import LoadedReward
from alignlab.types import Prompt

ROWS = [Prompt((1,), "q", i, {"answer": "x", "prompt": "q", "task": "t"}) for i in range(3)]


def needs(completions: list[str], ground_truth: list[str]) -> list[float]:
    raise AssertionError("a function that is not ours is not called")


def check(function: Any, prompts: Any = ROWS, **options: Any) -> None:
    check_columns([LoadedReward("own", function, options=options)], prompts, data="the training data")


def test_reserved_columns_do_not_reach_a_reward() -> None:
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


def test_a_required_column_that_some_rows_lack_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
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
        (length, {"max_tokens": "64"}, "the option max_tokens of length must be a whole number, and is '64'"),
        (length, {"min_tokens": 1.5}, "the option min_tokens of length must be a whole number"),
        (repetition, {"ngram_size": "3"}, "the option ngram_size of repetition must be a whole number"),
        (regex_format, {"pattern": 3}, "the option pattern of regex_format must be text, and is 3"),
        (regex_format, {}, "requires the option pattern, which is not given; add it, as options: {pattern: ...}"),
        (combine, {}, "requires the option parts, which is not given; add it"),
        (combine, {"parts": ["length"]}, "parts of combine must be a mapping of rewards to their weights"),
        (combine, {"parts": {}}, "parts of combine must be a mapping"),
        (combine, {"parts": {"length": "much"}}, "the part length of combine must be a weight"),
        (combine, {"parts": {"length": {"weight": "much"}}}, "weight of the part length of combine must be a number"),
        (combine, {"parts": {"length": {"max_tokens": "64"}}}, "the option max_tokens of length must be a whole"),
        (combine, {"parts": {"no.such:reward": 1}}, "'no.such:reward' that cannot be imported"),
        (combine, {"parts": {f"{__name__}:in_time": 1}}, "in_time, a part of combine, is asynchronous"),
        (exact_match, {}, "requires answer"),
    ],
)
def test_a_shipped_reward_that_could_never_work_is_refused(function: Any, options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(function, [Prompt((1,), "q", 0, {"task": "t"})], **options)


@pytest.mark.parametrize(
    ("function", "options", "named"),
    [
        (math_answer, {"relative_tolerance": "0.1"}, "relative_tolerance of math_answer must be a number"),
        (math_answer, {"thinking": True}, "thinking of math_answer must be auto, required or keep, and is True"),
        (exact_match, {"ignore_case": "false"}, "ignore_case of exact_match must be true or false, and is 'false'"),
        (reasoning_gym_answer, {"extract": "first"}, "extract of reasoning_gym_answer must be last_number, tagged or"),
    ],
)
def test_a_shipped_reward_refuses_an_option_of_the_wrong_type(function: Any, options: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        check(function, **options)


@pytest.mark.parametrize("function", [math_answer, exact_match, reasoning_gym_answer])
@pytest.mark.parametrize("answers", [["", ""], [" ", None], [float("nan"), float("nan")], [{"a": 1}, {"b": 2}]])
def test_a_reward_that_applies_to_no_row_is_refused(function: Any, answers: list[Any]) -> None:
    prompts = [Prompt((1,), "q", i, {"answer": answer}) for i, answer in enumerate(answers)]
    with pytest.raises(ConfigError, match=r"applies to none of the 2 rows of the training data: it gives None"):
        check(function, prompts)
    check(function, [*prompts, Prompt((1,), "q", 2, {"answer": "4"})])


async def in_time(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def test_shipped_rewards_that_apply_to_a_row_pass() -> None:
    check(math_answer)
    check(combine, parts={"exact_match": 1.0, "length": {"weight": 0.5, "max_tokens": 4}})
    check(regex_format, pattern=".*")


def test_a_required_column_that_holds_nothing_is_refused():
    prompts = [Prompt((1,), "q", i, {"answer": None}) for i in range(3)]
    with pytest.raises(ConfigError, match="requires answer, and this column holds nothing in all 3 rows of the train"):
        check(exact_match, prompts)


def test_columns_with_names_of_call_arguments_are_warned_of(caplog):
    check_columns([], [Prompt((1,), "q", 0, {"completion_ids": "mine", "answer": "1"})], data="the data")
    assert "the columns completion_ids of the data do not reach the rewards" in caplog.text
