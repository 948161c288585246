import math
from typing import Any

import numpy as np
import pytest
import reasoning_gym
from alignlab_rewards.reasoning_gym_answer import extract_answer, reasoning_gym_answer

from alignlab.data.tasks import task_rows

EASY = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 7.", "7"),
        ("= -4", "-4"),
        ("5 - 9 = −4.", "-4"),
        ("5-9", "9"),
        ("(3)-2", "2"),
        ("**-12**", "-12"),
        ("$1,234,567.50", "1234567.50"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        ("x = -.5", "-.5"),
        ("version v2", None),
        ("10%", "10"),
        (r"\boxed{8}", "8"),
        ("+8", "+8"),
        ("", None),
    ],
)
def test_the_last_number_is_extracted(text: str, number: str | None) -> None:
    assert extract_answer(text) == number


def test_a_tagged_and_a_whole_answer_are_extracted() -> None:
    assert extract_answer("<answer>1</answer> no <answer> 2\n</answer>", "tagged") == "2"
    assert extract_answer("2", "tagged") is None
    assert extract_answer(" a 2 \n", "whole") == "a 2"
    with pytest.raises(ValueError, match="last_number, tagged or whole"):
        extract_answer("2", "first")


def test_the_tasks_own_answers_are_right_and_others_wrong() -> None:
    rows = task_rows("chain_sum", options=EASY, size=20)
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    prompts = [row["prompt"] for row in rows]
    right = [f"That makes {row['answer']}." for row in rows]
    wrong = [f"That makes {int(row['answer']) + 1}." for row in rows]
    assert reasoning_gym_answer(prompts=prompts, completions=right, **columns) == [1.0] * 20
    assert reasoning_gym_answer(prompts=prompts, completions=wrong, **columns) == [0.0] * 20


def test_partial_credit_counts_as_zero() -> None:
    (row,) = task_rows("letter_counting", size=1)
    entry = {"question": row["prompt"], "answer": row["answer"], "metadata": row["metadata"]}
    text = f"the answer is {row['answer']}"
    assert 0 < reasoning_gym.create_dataset("letter_counting").score_answer(text, entry) < 1
    columns = {name: [row[name]] for name in row if name != "prompt"}
    prompts = [row["prompt"]]
    assert reasoning_gym_answer(prompts=prompts, completions=[text], extract="whole", **columns) == [0.0]
    assert reasoning_gym_answer(prompts=prompts, completions=[text], **columns) == [1.0]


def test_without_a_task_numbers_are_compared_by_value_and_text_as_text() -> None:
    completions = ["it is 4.0", "it is 5", "nothing", "yes", "yes"]
    answers = ["4", "4", "4", None, "yes"]
    prompts = ["q"] * 5
    assert reasoning_gym_answer(prompts=prompts, completions=completions, answer=answers) == [1.0, 0.0, 0.0, None, 0.0]
    assert reasoning_gym_answer(prompts=["q"], completions=["yes"], answer=["yes"], extract="whole") == [1.0]


def test_a_completion_that_the_scorer_cannot_read_is_wrong_and_a_broken_row_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def score(self: object, answer: str, entry: dict[str, object]) -> float:
        if answer != "1" or entry["metadata"] == {}:
            raise KeyError("metadata")
        return 1.0

    monkeypatch.setattr("reasoning_gym.arithmetic.chain_sum.ChainSumDataset.score_answer", score)
    columns: dict[str, Any] = {
        "prompts": ["q", "q"],
        "completions": ["1", "2"],
        "answer": ["1", "1"],
        "task": ["chain_sum"] * 2,
    }
    assert reasoning_gym_answer(**columns, metadata=[{"a": 1}] * 2) == [1.0, 0.0]
    with pytest.raises(KeyError):
        reasoning_gym_answer(**columns)


@pytest.mark.parametrize(
    ("gold", "text"),
    [(72.0, "72"), (np.int64(72), "72"), ("1,000", "1000"), ("72.", "72"), ("$18", "18"), ("So\n#### 1,042", "1042")],
)
def test_without_a_task_expected_answers_of_any_type_are_compared_by_value(gold: Any, text: str) -> None:
    values = reasoning_gym_answer(prompts=["q"] * 2, completions=[f"It is {text}.", "It is 5."], answer=[gold, gold])
    assert values == [1.0, 0.0]


def test_missing_answers_give_no_value_and_several_are_refused() -> None:
    golds = [math.nan, None]
    assert reasoning_gym_answer(prompts=["q"] * 2, completions=["1"] * 2, answer=golds) == [None, None]
    with pytest.raises(ValueError, match="one expected answer"):
        reasoning_gym_answer(prompts=["q"], completions=["1, 2"], answer=[["1", "2"]])
    assert reasoning_gym_answer(prompts=["q"], completions=["1, 2"], answer=[["1", "2"]], extract="whole") == [1.0]
