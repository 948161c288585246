"""Odd rows and odd files: whatever they hold, a reader reads them or says by name what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.data.examples import examples_from_rows
from alignlab.data.preferences import preferences_from_rows
from alignlab.data.prompts import load_prompts, prompts_from_rows
from alignlab.data.unpaired import unpaired_from_rows
from alignlab.errors import AlignlabError

READERS: dict[str, Callable[..., Any]] = {
    "prompts": prompts_from_rows,
    "examples": examples_from_rows,
    "preferences": partial(preferences_from_rows, margin_column="margin", probability_column="probability"),
    "unpaired": unpaired_from_rows,
}
COLUMNS = (
    "prompt", "messages", "completion", "answer", "chosen", "rejected", "label", "margin", "probability", "tools",
    "chat_template_kwargs", "images",
)  # fmt: skip
TEXTS = st.one_of(
    st.sampled_from(["", " \n", "hi", "<|im_end|>", "\ud83d", "e\u0301", "1.0", "true", "nan", "\x00", "[]"]),
    st.text(st.characters(), max_size=6),  # half characters too
)
SINGLE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXTS, st.binary(max_size=3),
    st.sampled_from(
        [
            10**400, Decimal("sNaN"), Decimal("1e999"), datetime(2026, 1, 1, tzinfo=UTC), pd.NA, pd.NaT, np.int64(1),
            np.float32("nan"), np.bool_(True), np.datetime64("NaT"), np.array(1), np.array(["a"]), np.array([1.5, 2]),
            {1, 2}, object(), 1j, range(2), np.array([{"role": "user", "content": "hi"}], dtype=object),
        ]
    ),
)  # fmt: skip
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "odd", None, 3])
MESSAGES = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "reasoning_content", "name", "function_call"]), SINGLE, max_size=4
)
CHATS = st.lists(
    st.one_of(st.builds(lambda role, text: {"role": role, "content": text}, ROLES, TEXTS), MESSAGES, SINGLE), max_size=4
)
NESTED = st.recursive(
    SINGLE, lambda held: st.lists(held, max_size=2) | st.dictionaries(TEXTS, held, max_size=2), max_leaves=4
)
VALUES = st.one_of(TEXTS, CHATS, SINGLE, NESTED)
ROWS = st.one_of(
    st.dictionaries(st.sampled_from(COLUMNS), VALUES, max_size=5),
    st.dictionaries(st.one_of(TEXTS, st.integers(), st.none(), st.tuples(st.integers())), VALUES, max_size=2),
    SINGLE,
)
SETTINGS = st.sampled_from(
    [
        RenderSettings(), RenderSettings(on_bad_row="skip"), RenderSettings(chat=False, on_bad_row="skip"),
        RenderSettings(prompt_template="Q: {prompt}", on_bad_row="skip", max_prompt_tokens=5),
        RenderSettings(prompt_column="chosen", on_bad_row="skip"),
    ]
)  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@given(rows=st.lists(ROWS, max_size=3), how=SETTINGS, chats=st.booleans())
@example(rows=[{3: "a"}], how=RenderSettings(), chats=True)
@example(rows=[7], how=RenderSettings(), chats=False)
@example(rows=[{"prompt": "\ud83d", "completion": "a"}], how=RenderSettings(), chats=False)
@example(rows=[{"prompt": "a", "completion": b"b", "label": pd.NA}], how=RenderSettings(), chats=False)
@example(rows=[{"prompt": "a", "tools": np.array([1.5, 2.0])}], how=RenderSettings(), chats=False)
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_unusual_rows_are_read_or_refused_with_a_named_error(
    reader: str, rows: Any, how: RenderSettings, chats: bool, plain_tokenizer: PreTrainedTokenizerFast,
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    tokenizer = chat_tokenizer if chats else plain_tokenizer
    try:
        READERS[reader](rows, how, tokenizer)
    except AlignlabError as error:
        assert str(error).isprintable() or "\n" in str(error)


PIECES = st.sampled_from(
    ['{"prompt": "a"}', '{"prompt": "a", "prompt": "b"}', "prompt,answer", "a,1", '"', ",", "\n", "\r", "\r\n", "[",
     "]", "{", "}", "null", "NaN", "\ufeff", "\x00", ";", "\t", "1" * 5000, "[" * 3000, '"\\ud83d"', ":", "prompt", "a"]
)  # fmt: skip


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz", "a.tsv", "a"])
@given(content=st.lists(PIECES, max_size=8).map(lambda parts: "".join(parts).encode()) | st.binary(max_size=20))
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
def test_unusual_files_are_read_or_refused_with_a_named_error(
    name: str, content: bytes, plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    for skip in ("error", "skip"):
        try:
            load_prompts(DataSettings(path=str(tmp_path / name), on_bad_row=skip), plain_tokenizer)
        except AlignlabError as error:
            assert name in str(error) or "prompt" in str(error)


@given(value=NESTED)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
def test_unusual_json_is_read_or_refused(
    value: Any, plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": value, "answer": value}, default=str) + "\n")
    try:
        load_prompts(DataSettings(path=str(path)), plain_tokenizer)
    except AlignlabError as error:
        assert "row 0" in str(error)
