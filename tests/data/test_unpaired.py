"""Unpaired preferences: two forms of rows, whom each completion is mismatched with, rows that are none."""

from __future__ import annotations

import random
from typing import Any

import pytest

from alignlab.config.data import RenderSettings
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.data.unpaired import UnpairedPreference, mismatch, unpaired_from_rows
from alignlab.errors import DataError

GOOD = {"prompt": "ab", "completion": " 1", "label": True}
BAD = {"prompt": "abc", "completion": " 2", "label": False}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["abc abd ab ba 123"], vocab_size=262)


def read(rows: Any, tokenizer: Any, **settings: Any) -> Any:
    return unpaired_from_rows(rows, RenderSettings(**settings), tokenizer)


def each(prompt: int, completion: int, desirable: bool) -> UnpairedPreference:
    return UnpairedPreference((prompt,), (completion,), desirable)


def test_labelled_rows_and_pairs_say_the_same(tokenizer: Any) -> None:
    rows = [
        {"prompt": "ab", "completion": " 1", "label": True}, {"prompt": "ab", "completion": " 2", "label": False},
        {"prompt": "ba", "completion": " 3", "label": True}, {"prompt": "ba", "completion": " 1", "label": False},
    ]
    pairs = [{"prompt": "ab", "chosen": " 1", "rejected": " 2"}, {"chosen": "ba 3", "rejected": "ba 1"}]
    one, other = read(rows, tokenizer), read(pairs, tokenizer)
    assert tuple(one) == tuple(other) and [x.desirable for x in one] == [True, False, True, False]
    assert one[0].prompt == one[1].prompt and one[0].completion[-1] == tokenizer.eos_token_id
    assert [x.mismatched for x in one] == [one[i].completion for i in (2, 3, 1, 1)]


def test_chat_messages_and_strings_say_the_same(tokenizer: Any) -> None:
    import copy

    chats = copy.deepcopy(tokenizer)
    chats.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    messages = [
        row | {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
        }
        for row in (GOOD, BAD)
    ]
    assert tuple(read(messages, chats)) == tuple(read([GOOD, BAD], chats))


def test_the_mismatched_completion_is_the_next_of_another_prompt() -> None:
    found = mismatch([each(1, 7, True), each(1, 8, True), each(2, 7, True), each(3, 9, True), each(4, 5, False)])
    assert [x.mismatched for x in found] == [(9,), (7,), (9,), (5,), (7,)]


def test_a_mismatched_completion_makes_no_sequence_longer_than_the_longest() -> None:
    long = UnpairedPreference((1,) * 5, (2, 3), True)
    short = UnpairedPreference((4,), (5,) * 6, False)
    assert [x.mismatched for x in mismatch([long, short])] == [(5, 5), (2, 3)]


def test_mismatched_completions_equal_those_of_a_slow_search() -> None:
    generator = random.Random(0)
    for _ in range(50):
        data = [
            each(generator.randrange(4), generator.randrange(4), generator.random() < 0.5)
            for _ in range(generator.randrange(8, 20))
        ]
        order = [x for x in data if x.desirable] + [x for x in data if not x.desirable]
        expected = {}
        for i, one in enumerate(order):
            around = order[i + 1 :] + order[:i]
            others = [x.completion for x in around if x.prompt != one.prompt and x.completion != one.completion]
            expected[id(one)] = others[0]
        assert [x.mismatched for x in mismatch(data)] == [expected[id(x)] for x in data]


def test_equal_completions_are_skipped_in_linear_time() -> None:
    data = [each(i, 7, True) for i in range(20_000)] + [each(-1, 8, False)]
    assert {x.mismatched for x in mismatch(data)[:-1]} == {(8,)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completion": "b"}, "has no column 'label'"),
        ({"prompt": "a", "label": True}, "has no column 'completion'"),
        ({"completion": "b", "label": True}, "has no column 'prompt'"),
        ({"prompt": "a", "completion": "b", "label": -1}, "has -1 in the column 'label', which holds true or false"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "has 'good' in the column 'label'"),
        ({"prompt": "a", "completion": " ", "label": True}, "has an empty string in the column 'completion'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "has the same completion in 'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": "b"}, "has no column 'rejected'"),
        (7, "is int, and must be a dict"),
    ],
)
def test_bad_rows_are_refused_with_their_number_or_counted(row: Any, message: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"row 1 .*{message}"):
        read([GOOD, row, BAD], tokenizer)
    found = read([GOOD, row, BAD], tokenizer, on_bad_row="skip")
    assert len(found) == 2 and found.skipped.total() == 1


@pytest.mark.parametrize(("label", "kind"), [(True, "true"), (False, "false")])
def test_labels_that_are_all_equal_are_refused(label: bool, kind: str, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=f"labels must be of both kinds, and all 2 are {kind}"):
        read([GOOD | {"label": label}, BAD | {"label": label}], tokenizer)


def test_a_single_prompt_has_no_mismatched_completion(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"there is none with another prompt and another completion; add rows"):
        read([GOOD, BAD | {"prompt": "ab"}], tokenizer)
