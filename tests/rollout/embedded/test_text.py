"""Stop strings, streaming, and text whose characters are several tokens."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from alignlab.errors import RolloutError
from alignlab.rollout.detokenizer import Detokenizer, decode
from alignlab.rollout.embedded.engine import EmbeddedEngine
from alignlab.rollout.embedded.places import Place
from alignlab.rollout.embedded.sampler import Draw, Sampler
from alignlab.rollout.vllm.completions import Answer, make_completion, make_requests
from alignlab.types import Prompt, SamplingParams
from tests.rollout.conftest import END, MakeEngine, flat, make_prompts

TEXT = "Größe 日本 👍🏽 – end? é\nSTOP here"


@pytest.fixture
def scripted(make_engine: MakeEngine, llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> EmbeddedEngine:
    """An engine whose model says TEXT byte after byte, and then ends."""
    script = [*TEXT.encode(), END]
    engine = make_engine()
    draw = Sampler.draw

    def draw_scripted(sampler: Sampler, logits: torch.Tensor, places: list[Place], inputs: Any) -> list[Draw]:
        logits = torch.zeros_like(logits)
        logits[:, script[places[0].number]] = 50.0
        return draw(sampler, logits, places, inputs)

    monkeypatch.setattr(Sampler, "draw", draw_scripted)
    return engine


@given(st.text(max_size=30), st.data())
def test_pieces_join_to_the_text(tokenizer: PreTrainedTokenizerFast, text: str, data: st.DataObject) -> None:
    tokens = list(text.encode(errors="replace"))
    tokens = tokens[: data.draw(st.integers(0, len(tokens)))]  # may end inside a character
    detokenizer = Detokenizer(tokenizer)
    for token in tokens:
        before = detokenizer.text
        detokenizer.push(token)
        assert detokenizer.text.startswith(before)
        assert "�" not in detokenizer.text
    whole = decode(tokenizer, tokens)
    assert whole.startswith(detokenizer.text)
    assert whole[len(detokenizer.text) :].strip("�") == ""


@given(st.lists(st.integers(0, 255), max_size=30))
def test_any_bytes_decode_as_the_whole_does(tokenizer: PreTrainedTokenizerFast, tokens: list[int]) -> None:
    detokenizer = Detokenizer(tokenizer)
    for token in tokens:
        detokenizer.push(token)
    assert decode(tokenizer, tokens).startswith(detokenizer.text)


def test_the_text_leaves_special_tokens_out(scripted: EmbeddedEngine) -> None:
    completion = flat(scripted.generate(make_prompts(3), SamplingParams(max_new_tokens=99)))[0]
    assert completion.text == TEXT
    assert completion.token_ids == (*TEXT.encode(), END)
    assert completion.finish_reason == "stop"


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        (("STOP",), TEXT[: TEXT.index("STOP")], TEXT[: TEXT.index("STOP") + 4]),
        (("本",), TEXT[: TEXT.index("本")], TEXT[: TEXT.index("本") + 1]),
        (("nowhere", "d?"), TEXT[: TEXT.index("d?")], TEXT[: TEXT.index("d?") + 2]),
        (("end", "nd"), TEXT[: TEXT.index("end")], TEXT[: TEXT.index("end") + 3]),  # both complete at once: the longer
        (("G",), "", "G"),
    ],
)
def test_text_is_cut_before_a_stop_string(
    stop: tuple[str, ...], text: str, tokens: str, scripted: EmbeddedEngine
) -> None:
    completion = flat(scripted.generate(make_prompts(3), SamplingParams(stop=stop, max_new_tokens=99)))[0]
    assert completion.text == text
    assert completion.token_ids == tuple(tokens.encode())
    assert completion.finish_reason == "stop"


def test_a_stop_string_that_is_complete_too_early_does_not_count(scripted: EmbeddedEngine) -> None:
    sampling = SamplingParams(stop=("e",), min_new_tokens=10, max_new_tokens=99)
    completion = flat(scripted.generate(make_prompts(3), sampling))[0]
    assert completion.text == TEXT[: TEXT.index("end")]


def test_a_stop_string_cut_by_the_limit_stays_in_the_text(scripted: EmbeddedEngine) -> None:
    limit = len(TEXT[: TEXT.index("STOP") + 3].encode())
    completion = flat(scripted.generate(make_prompts(3), SamplingParams(stop=("STOP",), max_new_tokens=limit)))[0]
    assert (completion.text[-3:], completion.finish_reason) == ("STO", "length")


@pytest.mark.parametrize("stop", [(), ("STOP",), ("here!",), ("日本 X", "nothing")])
def test_the_stream_joins_to_the_completion(stop: tuple[str, ...], scripted: EmbeddedEngine) -> None:
    sampling = SamplingParams(stop=stop, max_new_tokens=99)
    prompt = make_prompts(3)[0]
    pieces = list(scripted.stream(prompt, sampling))
    assert "".join(pieces) == flat(scripted.generate([prompt], sampling))[0].text
    assert len(pieces) > 10
    assert not any("�" in piece for piece in pieces)


def test_the_stream_is_the_sampled_text(make_engine: MakeEngine) -> None:
    engine = make_engine()
    sampling = SamplingParams(max_new_tokens=60, seed=2, temperature=1.5, stop=("a",))
    for prompt in make_prompts(4, 9, 30):
        text = flat(engine.generate([prompt], sampling))[0].text
        assert "".join(engine.stream(prompt, sampling)) == text


def test_one_call_at_a_time(make_engine: MakeEngine) -> None:
    engine = make_engine()
    prompt = make_prompts(4)[0]
    stream = engine.stream(prompt, SamplingParams(max_new_tokens=60, seed=2))
    next(stream)
    for call in (
        lambda: engine.generate([prompt], SamplingParams()), lambda: engine.update_weights(1), engine.rest,
        lambda: next(iter(engine.stream(prompt, SamplingParams()))),
    ):
        with pytest.raises(RolloutError, match="read the stream to its end or close it"):
            call()
    stream.close()  # type: ignore[attr-defined]
    engine.generate([prompt], SamplingParams())
    assert engine._space.blocks.num_free == engine._space.blocks.num_blocks


def test_the_policy_has_its_own_weights_between_pieces(make_engine: MakeEngine, llama: PreTrainedModel) -> None:
    llama.train()
    stream = make_engine().stream(Prompt((1, 2), ""), SamplingParams(max_new_tokens=60, seed=2))
    next(stream)
    assert llama.training


def test_only_one_completion_is_streamed(make_engine: MakeEngine) -> None:
    with pytest.raises(RolloutError, match=r"sampling\.n is 2, and must be 1 to stream"):
        make_engine().stream(make_prompts(4)[0], SamplingParams(n=2))


def test_a_stop_string_after_broken_bytes(make_engine: MakeEngine) -> None:
    """A tokenizer with byte fallback decodes a run of bytes as a whole, and spoils all of it for one that is bad."""
    vocabulary = {f"<0x{b:02X}>": b for b in range(256)} | {"a": 256, ".": 257}
    bare = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token=None))
    bare.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare)
    detokenizer = Detokenizer(tokenizer)
    for token in (*"👍".encode(), 0xF0, 256, 257):
        detokenizer.push(token)
    assert detokenizer.whole.startswith(detokenizer.text)
    assert detokenizer.whole.index(".") == detokenizer.text.index(".")


def with_tags(bare: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with more special tokens: a pair of tags, one tag, a token of turns, an end of the model's."""
    made = copy.deepcopy(bare)
    tokens = ("<answer>", "</answer>", "<|call|>", "<|turn|>", "<|eom|>")
    made.add_special_tokens({"additional_special_tokens": [AddedToken(token, special=True) for token in tokens]})
    made.chat_template = "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}<|turn|>"
    return made


WRITTEN = "<|turn|>a<|call|><answer>5</answer><|eom|><end>"


def test_tags_that_are_special_tokens_are_part_of_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    tagged = with_tags(tokenizer)
    ids = tagged(WRITTEN)["input_ids"]
    ends = tagged.convert_tokens_to_ids(["<|eom|>", "<end>"])
    assert decode(tagged, ids, ends) == "a<|call|><answer>5</answer>"
    assert decode(tagged, ids) == "a<|call|><answer>5</answer><|eom|>"
    detokenizer = Detokenizer(tagged, ends)
    for token in ids:
        detokenizer.push(token)
    assert detokenizer.whole == "a<|call|><answer>5</answer>"
    tagged.add_special_tokens({"additional_special_tokens": [AddedToken("<|late|>", special=True)]})
    late = tagged.convert_tokens_to_ids("<|late|>")
    assert decode(tagged, [late]) == "<|late|>", "a token that is added later is known"


def test_an_engine_of_vllm_looks_for_stop_strings_in_the_same_text(
    tokenizer: PreTrainedTokenizerFast, llama: PreTrainedModel
) -> None:
    tagged, sampling = with_tags(tokenizer), SamplingParams(stop=("</answer>",))
    for one, skips in ((tokenizer, True), (tagged, False)):
        [request] = make_requests(make_prompts(3), [sampling], llama, one)
        assert request.params["skip_special_tokens"] is skips
    ids = tuple(tagged("a<answer>5</answer>")["input_ids"])
    answer = Answer(ids, (0.0,) * len(ids), "stop", "</answer>", (0,) * len(ids), None)
    assert make_completion(answer, tagged, sampling, llama).text == "a<answer>5"
    turn = replace(answer, stop_text="<|turn|>")
    assert make_completion(turn, tagged, sampling, llama).text == "a<answer>5</answer>"
