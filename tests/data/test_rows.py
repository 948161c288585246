"""Missing values, gaps, labels and numbers of rows."""

from __future__ import annotations

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.examples import examples_from_rows, load_examples
from alignlab.data.preferences import load_preferences, preferences_from_rows
from alignlab.data.prompts import load_prompts, prompts_from_rows
from alignlab.data.rows import as_label, as_number, is_missing, plain_row, readable_rows
from alignlab.data.unpaired import load_unpaired, unpaired_from_rows
from alignlab.errors import DataError

GAPPED = [{"prompt": "a", "answer": 72}, {"prompt": "b", "answer": None}, {"prompt": "c", "answer": 5}]


@pytest.mark.parametrize(
    "value",
    [None, math.nan, np.float32("nan"), np.float64("nan"), Decimal("NaN"), Decimal("sNaN"), pd.NA, pd.NaT,
     np.datetime64("NaT"), torch.tensor(math.nan)],
)  # fmt: skip
def test_missing_values_are_none(value: Any) -> None:
    assert is_missing(value)
    assert plain_row({"answer": value}) == {"answer": None}


@pytest.mark.parametrize("value", [0, 0.0, "", "nan", False, [], np.array([math.nan]), np.int64(0), Decimal(0)])
def test_present_values_are_unchanged(value: Any) -> None:
    assert not is_missing(value)
    assert plain_row({"answer": value})["answer"] is value


@pytest.mark.parametrize(
    ("value", "label"),
    [(True, True), (np.bool_(False), False), (1, True), (0, False), (1.0, True), (np.int64(0), False), ("true", True),
     (" False ", False), ("1", True), ("0.0", False), (torch.tensor(1), True), (Decimal(1), True), ("TRUE", True)],
)  # fmt: skip
def test_labels_that_are_read(value: Any, label: bool) -> None:
    assert as_label(value, "label") is label


@pytest.mark.parametrize("value", [-1, 2, 0.5, "yes", "", "good", "-1", "+1", math.nan, [True], None, [10**5000], b"1"])
def test_labels_that_are_refused(value: Any) -> None:
    with pytest.raises(BadRow, match=r"'label', which holds true or false, 1 or 0.*write 1 for a good completion"):
        as_label(value, "label")


@pytest.mark.parametrize(
    ("value", "number"),
    [(2, 2.0), (0.5, 0.5), ("0.5", 0.5), (" -3 ", -3.0), ("1e-3", 1e-3), (".5", 0.5), (np.float32(0.5), 0.5),
     (Decimal("0.25"), 0.25), (np.int64(3), 3.0), (torch.tensor(0.5), 0.5), (10**400, math.inf), ("1e999", math.inf)],
)  # fmt: skip
def test_numbers_that_are_read(value: Any, number: float) -> None:
    assert as_number(value, "margin") == number


@pytest.mark.parametrize("value", [True, np.bool_(True), "1,5", "50%", "1_000", "nan", "inf", "", "\u0661", [1], 1j])
def test_numbers_that_are_refused(value: Any) -> None:
    with pytest.raises(BadRow, match=r"'margin', which holds numbers; write them as 0\.5"):
        as_number(value, "margin")


def test_labels_margins_and_probabilities_of_csv_are_read(
    plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.csv"
    pd.DataFrame([{"prompt": "q", "completion": f"a{i}", "label": i % 2 == 0} for i in range(2)] + [
        {"prompt": "r", "completion": f"b{i}", "label": i % 2 == 0} for i in range(2)
    ]).to_csv(path, index=False)
    assert [one.desirable for one in load_unpaired(DataSettings(path=str(path)), plain_tokenizer)] == [True, False] * 2
    pd.DataFrame([{"prompt": "q", "chosen": "a", "rejected": "b", "by": 0.5, "p": 0.75}]).to_csv(path, index=False)
    [pair] = load_preferences(
        DataSettings(path=str(path)), plain_tokenizer, margin_column="by", probability_column="p"
    )
    assert pair.labels == (0.5, 0.75)


def test_labels_of_plus_and_minus_one_are_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": 1}, {"prompt": "r", "completion": "b", "label": -1}]
    with pytest.raises(DataError, match=r"row 1 .* has -1 in the column 'label'"):
        unpaired_from_rows(rows, RenderSettings(), plain_tokenizer)


def test_a_missing_label_is_an_error_with_the_column(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "q", "completion": "a", "label": math.nan}]
    with pytest.raises(DataError, match=r"row 0 .* has nothing in the column 'label'"):
        unpaired_from_rows(rows, RenderSettings(), plain_tokenizer)


@pytest.mark.parametrize("suffix", ["parquet", "json", "jsonl"])
def test_a_column_of_integers_with_missing_values_keeps_integers(
    suffix: str, plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path, table = tmp_path / f"rows.{suffix}", pd.DataFrame(GAPPED)
    if suffix == "parquet":
        table.to_parquet(path)
    else:
        table.to_json(path, orient="records", lines=suffix == "jsonl")
        assert "72.0" in path.read_text()
    answers = [p.columns["answer"] for p in load_prompts(DataSettings(path=str(path)), plain_tokenizer)]
    assert answers == [72, None, 5] and type(answers[0]) is int
    found = load_examples(DataSettings(path=str(path), on_bad_row="skip"), plain_tokenizer)
    assert [plain_tokenizer.decode(e.token_ids, skip_special_tokens=True) for e in found] == ["a72", "c5"]


def test_rows_of_a_table_in_memory_are_read_as_its_file(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    for rows in (pd.DataFrame(GAPPED).to_dict("records"), Dataset.from_pandas(pd.DataFrame(GAPPED))):
        found = prompts_from_rows(rows, RenderSettings(), plain_tokenizer)
        assert [prompt.columns["answer"] for prompt in found] == [72, None, 5]


@pytest.mark.parametrize("answers", [[72.0, 5.0], [72.5, None, 5.0], [72.0, None, "5"], [2.0**60, None], [None, None]])
def test_other_columns_are_unchanged(answers: list[Any]) -> None:
    rows = [{"answer": answer} for answer in answers]
    assert [type(row["answer"]) for row in readable_rows(rows, RenderSettings())] == [type(a) for a in answers]


def test_chats_in_pandas_arrays_are_read(
    chat_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path = tmp_path / "rows.parquet"
    pd.DataFrame([{"messages": chat}]).to_parquet(path)
    rows = pd.read_parquet(path).to_dict("records")
    assert isinstance(rows[0]["messages"], np.ndarray)
    assert examples_from_rows(rows, RenderSettings(), chat_tokenizer) == examples_from_rows(
        [{"messages": chat}], RenderSettings(), chat_tokenizer
    )


def test_null_fields_from_arrow_are_left_out_of_a_chat(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "name": "Bo"}],
        [{"role": "user", "content": "what"}, {"role": "assistant", "content": "3"}],
    ]
    rows: Any = [{"messages": chat} for chat in chats]
    assert Dataset.from_list(rows)[1]["messages"][0]["name"] is None
    expected = examples_from_rows(rows, RenderSettings(), chat_tokenizer)
    assert examples_from_rows(Dataset.from_list(rows), RenderSettings(), chat_tokenizer) == expected


HALF: list[dict[str, Any]] = [
    {"prompt": "cut \ud83d here", "completion": "x", "label": True},
    {"prompt": "q", "completion": "cut \udc00", "label": True},
    {"prompt": "q", "answer": "\ud83d"},
    {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "a"}]},
    {"chosen": "q \ud83d", "rejected": "q a"},
]


@pytest.mark.parametrize("row", HALF)
def test_half_characters_are_named_and_can_be_skipped(
    row: dict[str, Any], chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = RenderSettings(chat=False)
    read: Any = preferences_from_rows if "chosen" in row else examples_from_rows
    settings = RenderSettings() if "messages" in row else plain
    with pytest.raises(DataError, match=r"row 1 .* has half a character \(U\+D[C8]"):
        read([{"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b"}, row], settings, chat_tokenizer)
    skipping = settings.model_copy(update={"on_bad_row": "skip"})
    rows = [row, {"prompt": "q", "completion": "a", "chosen": "a", "rejected": "b"}]
    assert read(rows, skipping, chat_tokenizer).skipped == {"not_unicode": 1}


def test_half_characters_of_reward_columns_are_none_of_the_prompt(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    [prompt] = prompts_from_rows([{"prompt": "q", "note": "\ud83d"}], RenderSettings(), plain_tokenizer)
    assert prompt.columns["note"] == "\ud83d"


def test_bytes_are_no_text(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"row 0 .* has bytes in the column 'prompt'"):
        prompts_from_rows([{"prompt": b"hi"}], RenderSettings(), plain_tokenizer)
