import pytest
from alignlab_rewards.math_answer import math_answer

from tests.rewards.answer_rows import ROWS


@pytest.mark.parametrize("category", ROWS)
def test_every_row_of_the_table_gets_its_value(category: str) -> None:
    rows = ROWS[category]
    values = math_answer(completions=[text for _, text, _ in rows], answer=[gold for gold, _, _ in rows])
    wrong = [(gold, text, got) for (gold, text, value), got in zip(rows, values, strict=True) if got != value]
    assert not wrong


def test_the_table_has_right_and_wrong_answers_in_every_category() -> None:
    assert all({value for _, _, value in rows} == {0.0, 1.0} for rows in ROWS.values())
    values = [value for rows in ROWS.values() for _, _, value in rows]
    assert len(values) >= 700
    assert values.count(0.0) >= 0.4 * len(values)


@pytest.mark.parametrize("category", ROWS)
def test_a_right_answer_stays_right_behind_reasoning_and_a_wrong_one_wrong(category: str) -> None:
    rows = [row for row in ROWS[category] if "<" not in row[1] and "[THINK]" not in row[1]]
    texts = [f"<think>\nIt may be {gold}, or \\boxed{{{gold}}}.\n</think>\n\n{text}" for gold, text, _ in rows]
    values = math_answer(completions=texts, answer=[gold for gold, _, _ in rows])
    wrong = [(gold, text, got) for (gold, text, value), got in zip(rows, values, strict=True) if got != value]
    assert not wrong
