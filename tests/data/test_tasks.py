import hashlib
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignlab.data.tasks import split_of, task_rows
from alignlab.errors import ConfigError, DataError

SINGLE_DIGITS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def questions(**options: object) -> list[str]:
    return [row["prompt"] for row in task_rows("chain_sum", options=SINGLE_DIGITS, **options)]  # type: ignore[arg-type]


@pytest.mark.parametrize("eval_frac", [0.1, 0.5])
def test_splits_share_no_question_whatever_the_seeds(eval_frac: float) -> None:
    train = {q for seed in range(3) for q in questions(split="train", seed=seed, eval_frac=eval_frac)}
    held_out = {q for seed in range(3, 6) for q in questions(split="eval", seed=seed, eval_frac=eval_frac)}
    assert train and held_out
    assert not train & held_out


def test_splits_together_are_all_questions_each_once() -> None:
    train, held_out = questions(split="train"), questions(split="eval")
    assert len(train) == len(set(train)) and len(held_out) == len(set(held_out))
    assert len(train) + len(held_out) == 10 * 10 * 2
    assert 0.1 < len(held_out) / 200 < 0.3


@settings(deadline=None)
@given(st.text(), st.floats(0.01, 0.99))
def test_the_split_depends_on_the_text_alone(question: str, eval_frac: float) -> None:
    fraction = int(hashlib.sha256(question.encode()).hexdigest()[:16], 16) / 16**16
    assert split_of(question, eval_frac=eval_frac) == ("eval" if fraction < eval_frac else "train")


def test_size_selects_the_first_questions_and_the_seed_changes_them() -> None:
    assert questions(size=7) == questions(size=20)[:7]
    assert questions(size=7, seed=1) != questions(size=7)


def test_rows_hold_the_columns_that_a_scorer_needs() -> None:
    (row,) = task_rows("chain_sum", options=SINGLE_DIGITS, size=1)
    assert set(row) == {"prompt", "answer", "task", "task_options", "metadata"}
    assert str(eval(row["metadata"]["expression"])) == row["answer"]
    assert (row["task"], row["task_options"]) == ("chain_sum", SINGLE_DIGITS)


def test_fewer_questions_than_asked_for_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = questions(size=500)
    assert f"has only {len(found)} distinct questions" in caplog.text


@pytest.mark.parametrize(
    ("task", "options", "named"),
    [
        ("chain_sun", {}, "nearest: chain_sum"),
        ("chain_sum", {"min_term": 1}, "did you mean 'min_terms'"),
        ("chain_sum", {"seed": 1}, "set data.seed instead"),
        ("chain_sum", {"min_terms": 5, "max_terms": 2}, "max_terms must be >= min_terms"),
    ],
)
def test_unknown_tasks_and_options_are_named(task: str, options: dict[str, int], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        task_rows(task, options=options)


def test_unknown_split_and_empty_split_are_refused() -> None:
    with pytest.raises(ConfigError, match='"train" or "eval"'):
        task_rows("chain_sum", split="test")
    with pytest.raises(DataError, match="at least one question"):
        questions(split="eval", eval_frac=1e-9)


def test_a_missing_reasoning_gym_is_an_error_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(ConfigError, match="pip install"):
        task_rows("chain_sum")
