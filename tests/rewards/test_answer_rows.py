import pytest
from alignlab_rewards.math_answer import math_answer

from tests.rewards.answer_rows import ROWS, Row


def misjudged(rows: list[Row], values: list[float | None]) -> list[tuple[str, str, float | None]]:
    return [(gold, text, got) for (gold, text, value), got in zip(rows, values, strict=True) if got != value]


@pytest.mark.parametrize("category", ROWS)
def test_every_row_of_the_table_gets_its_value(category: str) -> None:
    rows = ROWS[category]
    values = math_answer(completions=[text for _, text, _ in rows], answer=[gold for gold, _, _ in rows])
    assert misjudged(rows, values) == []


def test_the_table_has_right_and_wrong_answers_in_every_category() -> None:
    assert all({value for _, _, value in rows} == {0.0, 1.0} for rows in ROWS.values())
    values = [value for rows in ROWS.values() for _, _, value in rows]
    assert len(values) >= 700
    assert values.count(0.0) >= 0.4 * len(values)


@pytest.mark.parametrize("category", ROWS)
def test_reasoning_in_front_changes_no_verdict(category: str) -> None:
    rows = [row for row in ROWS[category] if "<" not in row[1] and "[THINK]" not in row[1]]
    texts = [f"<think>\nIt may be {gold}, or \\boxed{{{gold}}}.\n</think>\n\n{text}" for gold, text, _ in rows]
    values = math_answer(completions=texts, answer=[gold for gold, _, _ in rows])
    assert misjudged(rows, values) == []
