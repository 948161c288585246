from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from alignlab.data.tokenizer_training import EOS_TOKEN, PAD_TOKEN, train_tokenizer
from alignlab.errors import ConfigError


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text())
def test_any_text_decodes_to_itself(plain_tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert plain_tokenizer.decode(plain_tokenizer(text)["input_ids"]) == text


def test_special_tokens_have_the_first_ids_and_no_token_is_added(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert plain_tokenizer.convert_ids_to_tokens([0, 1]) == [PAD_TOKEN, EOS_TOKEN]
    assert (plain_tokenizer.pad_token_id, plain_tokenizer.eos_token_id) == (0, 1)
    assert plain_tokenizer.chat_template is None
    assert plain_tokenizer("12" + EOS_TOKEN)["input_ids"][-1] == 1
    assert len(plain_tokenizer("12")["input_ids"]) == 2


def test_frequent_text_is_merged_and_digits_are_not() -> None:
    tokenizer = train_tokenizer(["the sum of 123 and 123"] * 20, vocab_size=300)
    assert len(tokenizer(" sum")["input_ids"]) == 1
    assert len(tokenizer("123")["input_ids"]) == 3


def test_the_vocabulary_is_bounded_and_the_same_each_time() -> None:
    texts = ["a quick brown fox jumps over a lazy dog"] * 3
    first, second = (train_tokenizer(texts, vocab_size=280) for _ in range(2))
    assert len(first) == 280
    assert first.get_vocab() == second.get_vocab()


def test_saved_and_loaded_by_transformers(plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    plain_tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = " a , b . don't\n"
    assert loaded(text)["input_ids"] == plain_tokenizer(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.pad_token_id, loaded.eos_token_id) == (0, 1)


def test_too_small_a_vocabulary_or_no_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 258"):
        train_tokenizer(["x"], vocab_size=257)
    with pytest.raises(ConfigError, match="there is none"):
        train_tokenizer([], vocab_size=300)
