"""Token ids without a row in an embedding table are named with the item, the token and the fix."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.data.vocabulary import check_end_token, check_ids, num_token_ids
from alignlab.errors import ConfigError


@pytest.fixture
def tokenizer() -> Any:
    made = train_tokenizer(["abc"] * 9, vocab_size=260)
    made.add_tokens(["<new>"])
    return made


def test_the_number_of_ids_is_the_largest_id_plus_one(tokenizer: Any) -> None:
    assert num_token_ids(tokenizer) == max(tokenizer.get_vocab().values()) + 1 == len(tokenizer)


def test_ids_up_to_the_last_row_are_accepted(tokenizer: Any) -> None:
    last = num_token_ids(tokenizer) - 1
    check_ids([[(0, last), ()], [()]], {"the model": last + 1}, tokenizer, what="example")


def test_an_id_past_the_smallest_table_is_named(tokenizer: Any) -> None:
    last = num_token_ids(tokenizer) - 1
    tables = {"the model": last + 9, "the teacher": last}
    with pytest.raises(ConfigError, match=rf"example 1 .* id {last} \('<new>'\), and the teacher has {last} rows"):
        check_ids([[(0,)], [(1,), (2, last)]], tables, tokenizer, what="example")


def test_an_end_token_without_a_row_is_refused(tokenizer: Any) -> None:
    tokenizer.eos_token = "<new>"
    with pytest.raises(ConfigError, match=r"ends texts with token id \d+ \('<new>'\)"):
        check_end_token(tokenizer, num_token_ids(tokenizer) - 1, [])


@pytest.mark.parametrize(("model_ends", "said"), [([7], True), ([], False), (None, False)])
def test_an_end_token_unknown_to_the_model_is_logged(
    model_ends: list[int] | None, said: bool, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ends = [tokenizer.eos_token_id] if model_ends is None else model_ends
    with caplog.at_level(logging.WARNING, logger="alignlab"):
        check_end_token(tokenizer, 400, ends)
    assert ("the model's configs name 7" in caplog.text) == said


def test_unused_tokens_without_a_row_are_logged(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="alignlab"):
        check_end_token(tokenizer, num_token_ids(tokenizer) - 1, [])
    assert "one of the last 1 tokens is refused" in caplog.text
