"""Where the prompt of a pair without a prompt ends."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from alignlab.config.data import RenderSettings
from alignlab.data.bad_row import BadRow
from alignlab.data.common_prompt import common_prompt
from alignlab.data.preferences import preferences_from_rows

SPECIAL = ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("A: -5", "A: -6", "A:"), ("A: 3.14", "A: 3.15", "A:"), ("A: 1,234", "A: 1,235", "A:"),
        ("t? 12:30", "t? 12:31", "t?"),
        ("A: well-known", "A: well-knit", "A:"), ("A: don't", "A: don'ts", "A:"), ("A: Yes", "A: Yesterday", "A:"),
        ("A: caf\u00e9s", "A: cafes", "A:"), ("A: e\u0301", "A: e\u0300", "A:"), ("A: Yes, sir", "A: Yes sir", "A:"),
        ("A: $5", "A: $6", "A:"), ("A: f(x)=1", "A: f(x)=2", "A:"), ("A: http://a.b", "A: http://a.c", "A:"),
        ("A: \U0001f1f3\U0001f1f4", "A: \U0001f1f3\U0001f1f1", "A:"), ("A: \U0001f44d", "A: \U0001f44e", "A:"),
        ("A: \U0001f468\u200d\U0001f469", "A: \U0001f468\u200d\U0001f466", "A:"), ("A:\tb", "A:\tc", "A:\t"),
        ("A:\r\nb", "A:\r\nc", "A:\r\n"), ("A: Yes sir", "A: Yessir", "A:"), ("a b  c", "a b  d", "a b "),
        ("<|im_start|>yes", "<|im_start|>no", "<|im_start|>"),
        ("q <|im_start|>a<|im_end|>", "q <|im_start|>a<|im_start|>", "q <|im_start|>"),
        ("<|im_start|>3.14", "<|im_start|>3.15", "<|im_start|>"),
        ("\u7b54\uff1a-5", "\u7b54\uff1a-6", "\u7b54\uff1a"), ("\u03c0\u662f3.14", "\u03c0\u662f3.15", "\u03c0\u662f"),
        ("\u7b54\uff1a\uff11\uff12", "\u7b54\uff1a\uff11\uff13", "\u7b54\uff1a"),
        ("\u7b54\uff1a\u306f\u3099", "\u7b54\uff1a\u306f\u309a", "\u7b54\uff1a"),
        ("\u0e15\u0e2d\u0e1a:\u0e01\u0e34", "\u0e15\u0e2d\u0e1a:\u0e01\u0e35", "\u0e15\u0e2d\u0e1a:"),
        ("2+2=4", "2+2=5", "2+2="), ("###Q:hi###A:yes", "###Q:hi###A:no", "###Q:hi###A:"), ("x=-5", "x=-6", "x="),
    ],
)  # fmt: skip
def test_a_prompt_ends_outside_words_numbers_and_characters(chosen: str, rejected: str, prompt: str) -> None:
    for one, other in ((chosen, rejected), (rejected, chosen)):
        assert common_prompt(one, other, SPECIAL) == (prompt, one.removeprefix(prompt), other.removeprefix(prompt))


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("abc", "abd", "other_prompt"), ("-5", "-6", "other_prompt"), ("a", "b", "other_prompt"),
        ("A: ", "A: b", "empty"), ("A: yes", "A: yes sir", "empty"), ("ab", "abc", "empty"), ("A:", "A:hi", "empty"),
        ("A: same", "A: same", "empty"), ("A: b", "A: \n", "empty"),
    ],
)  # fmt: skip
def test_texts_without_a_common_beginning_or_a_different_end_are_refused(
    chosen: str, rejected: str, reason: str
) -> None:
    with pytest.raises(BadRow) as error:
        common_prompt(chosen, rejected)
    assert error.value.reason == reason


WORDS = st.text(st.sampled_from("ab1.,-' \n\u0301\u4e00\u3042\u0e01\u0e34"), max_size=8)


@given(start=WORDS, one=WORDS, other=WORDS)
@settings(max_examples=300, deadline=None)
def test_the_pieces_join_to_the_texts_and_no_word_is_cut(start: str, one: str, other: str) -> None:
    try:
        prompt, chosen, rejected = common_prompt(start + one, start + other)
    except BadRow:
        return
    assert (prompt + chosen, prompt + rejected) == (start + one, start + other)
    assert prompt and chosen.strip() and rejected.strip()
    last, firsts = prompt[-1], {chosen[0], rejected[0]}
    assert not (last in "ab1.,-'" and firsts & set("ab1.,-'"))
    assert not firsts & set("\u0301\u0e34"), "a mark belongs to the character before it"


@pytest.mark.parametrize("text", ["A: -5", "A: 3.14", "A: well-known", "A: don't", "q <|im_start|>b"])
def test_tokens_of_prompt_and_completion_are_those_of_the_text(
    text: str, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    [pair] = preferences_from_rows(
        [{"chosen": text, "rejected": text[:-1] + "x"}], RenderSettings(chat=False), chat_tokenizer
    )
    assert [*pair.prompt, *pair.chosen[:-1]] == chat_tokenizer(text)["input_ids"]
