from __future__ import annotations

import json

import pytest

from alignlab.errors import ConfigError, DataError
from alignlab.evaluation.likelihood.texts import ScoredText, check_windows, read_texts, windows_of
from tests.rollout.conftest import END


def text_of(length: int) -> ScoredText:
    return ScoredText(tuple(range(length)), (False, *[True] * (length - 1)), length, 1)


@pytest.mark.parametrize("length", [2, 5, 6, 7, 12, 23])
@pytest.mark.parametrize(("width", "stride"), [(2, 1), (5, 3), (6, 5), (6, 1), (30, 15)])
def test_each_token_counts_once_with_enough_before_it(length, width, stride):
    counted = []
    for window in windows_of([text_of(length)], width=width, stride=stride):
        assert len(window.token_ids) <= width
        for place, (token, scored) in enumerate(zip(window.token_ids, window.scored, strict=True)):
            if scored:
                counted.append(token)
                assert place >= min(token, width - stride), "as many tokens before it as the first window has, or these"
    assert counted == list(range(1, length))


def test_windows_by_hand():
    windows = list(windows_of([text_of(3), text_of(8)], width=5, stride=3))
    assert [(w.text, w.token_ids, sum(w.scored)) for w in windows] == [
        (0, (0, 1, 2), 2), (1, (0, 1, 2, 3, 4), 4), (1, (3, 4, 5, 6, 7), 3)
    ]  # fmt: skip


def test_windows_without_a_token_that_counts_are_left_out():
    completion = ScoredText(tuple(range(9)), (*[False] * 7, True, True), 2, 1)
    windows = list(windows_of([completion], width=4, stride=2))
    assert [(window.token_ids, sum(window.scored)) for window in windows] == [((4, 5, 6, 7), 1), ((6, 7, 8), 1)]


def test_a_file_is_one_text_behind_the_end_token(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("été is\nsummer\n")
    [text] = read_texts(str(tmp_path / "a.txt"), tokenizer)
    assert text.token_ids == (END, *"été is\nsummer\n".encode())
    assert (text.num_bytes, text.num_words, sum(text.scored)) == (16, 3, 16)


def test_rows_of_text_and_rows_of_completions(tmp_path, tokenizer):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("ab", "c d e")))
    assert [(t.token_ids[1:], t.num_words) for t in read_texts(str(rows), tokenizer)] == [
        (tuple(b"ab"), 1), (tuple(b"c d e"), 3)
    ]  # fmt: skip
    rows.write_text(json.dumps({"prompt": "say it ", "completion": "red car"}) + "\n")
    [text] = read_texts(str(rows), tokenizer)
    assert text.token_ids == (*b"say it red car", END) and text.scored == (False,) * 7 + (True,) * 8
    assert (text.num_bytes, text.num_words) == (7, 2), "the end token counts, and is no byte of the text"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "is empty"),
        ("a.jsonl", "", "has"),
        ("a.jsonl", '{"text": "a"}\n{"text": 1}\n', "row 1 .* must have a string in its column 'text'"),
        ("a.jsonl", '{"text": "a"}\n{"text": ""}\n', "row 1 must have a token"),
        ("a.jsonl", '{"question": "a"}\n', "row 0"),
    ],
)
def test_texts_that_cannot_be_measured_are_refused(tmp_path, tokenizer, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_texts(str(tmp_path / name), tokenizer)


def test_a_missing_file_is_named(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"none\.txt cannot be read"):
        read_texts(str(tmp_path / "none.txt"), tokenizer)


@pytest.mark.parametrize(
    ("width", "stride", "message"),
    [(1, 1, "--window is 1"), (129, 3, "model's 128 positions"), (8, 8, "--stride is 8"), (8, 0, "--stride is 0")],
)
def test_windows_that_cannot_be_read_are_refused(width, stride, message):
    with pytest.raises(ConfigError, match=message):
        check_windows(width, stride, 128)
