import math
from decimal import Decimal

import numpy as np
import pytest
from alignlab_rewards.exact_match import exact_match


def test_only_the_answer_itself_counts() -> None:
    completions = ["4", " 4\n", "4.", "It is 4", "-4"]
    assert exact_match(completions=completions, answer=["4"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_chat_messages_case_and_whole_numbers() -> None:
    chat = [{"role": "assistant", "content": "YES"}]
    assert exact_match(completions=[chat, chat], answer=["yes", None]) == [0.0, None]
    assert exact_match(completions=[chat], answer=["yes"], ignore_case=True) == [1.0]
    assert exact_match(completions=["7"], answer=[7]) == [1.0]


def test_numbers_are_compared_by_value_and_text_as_text() -> None:
    golds = [72.0, np.float64(72.0), Decimal("72.50"), np.int64(7), 72.0, "72.0"]
    texts = ["72", "72.0", "72.5", "7", "72.5", "72"]
    assert exact_match(completions=texts, answer=golds) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_a_missing_answer_gives_no_value() -> None:
    golds = [math.nan, np.float64("nan"), None, ""]
    assert exact_match(completions=["72"] * 4, answer=golds) == [None] * 4


def test_a_worked_solution_is_matched_by_its_last_line_or_the_whole() -> None:
    solution = "6 * 7 = <<6*7=42>>42.\n#### 42"
    assert exact_match(completions=["42", solution, "6", "#### 42"], answer=[solution] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_lists_and_ground_truths_are_read_and_other_mappings_refused() -> None:
    assert exact_match(completions=["1, 2", "72"], answer=[["1", 2], {"ground_truth": "72"}]) == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"exact_match needs .* keys \['value'\]"):
        exact_match(completions=["72"], answer=[{"value": "72"}])
