import copy
import logging
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from alignlab.config.data import DataSettings
from alignlab.data.examples import Example, examples_from_rows, load_examples
from alignlab.data.prompts import prompts_from_rows
from alignlab.data.sources import load_rows
from alignlab.errors import ConfigError, DataError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
BLANK = {"role": "assistant", "content": " "}


def taught(example: Example, tokenizer: PreTrainedTokenizerFast) -> str:
    pairs = zip(example.token_ids, example.completion_mask, strict=True)
    return str(tokenizer.decode([token for token, kept in pairs if kept]))


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "1 + 2 =", "answer": 3}, " 3!<|endoftext|>"),
        ({"prompt": "1 + 2 =", "completion": "three", "answer": 3}, "three<|endoftext|>"),
        ({"prompt": "1 + 2 =", "completion": "three<|endoftext|>"}, "three<|endoftext|>"),
    ],
)
def test_plain_examples(plain_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], expected: str) -> None:
    (example,) = examples_from_rows([row], DataSettings(), plain_tokenizer, answer_template=" {answer}!")
    assert plain_tokenizer.decode(example.token_ids) == "1 + 2 =" + expected
    assert taught(example, plain_tokenizer) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "hi", "answer": "yo"},
        {"prompt": "hi", "completion": "yo"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER]},
    ],
)
def test_a_chat_in_each_form(chat_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any]) -> None:
    settings = DataSettings(system_prompt="Be brief.")
    (example,) = examples_from_rows([row], settings, chat_tokenizer)
    (prompt,) = prompts_from_rows([{"prompt": "hi"}], settings, chat_tokenizer)
    cut = len(prompt.token_ids)
    assert example.token_ids[:cut] == prompt.token_ids, "what is taught follows a rollout's prompt"
    assert not any(example.completion_mask[:cut]) and all(example.completion_mask[cut:])
    assert chat_tokenizer.decode(example.token_ids[cut:]) == "yo<|im_end|>"


def test_every_turn_of_the_assistant_is_taught(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [USER, ANSWER, {"role": "user", "content": "x"}, {"role": "assistant", "content": "b"}, USER]
    (example,) = examples_from_rows([{"messages": messages}], DataSettings(), chat_tokenizer)
    assert taught(example, chat_tokenizer) == "yo<|im_end|>b<|im_end|>"
    whole = chat_tokenizer.apply_chat_template(messages[:4], tokenize=False).rstrip()
    assert chat_tokenizer.decode(example.token_ids) == whole
    assert example.token_ids == tuple(chat_tokenizer(whole)["input_ids"])


def test_only_the_completion_is_trained_on(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [{"role": "assistant", "content": "b"}]}
    (example,) = examples_from_rows([row], DataSettings(), chat_tokenizer)
    assert taught(example, chat_tokenizer) == "b<|im_end|>"


@pytest.mark.parametrize("prompt", ["hi", [USER]])
def test_a_whole_conversation_as_completion_is_cut_after_the_prompt(
    prompt: Any, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = DataSettings(system_prompt="Be brief.")
    whole, rest = (
        examples_from_rows([{"prompt": prompt, "completion": completion}], settings, chat_tokenizer)[0]
        for completion in ([USER, ANSWER], [ANSWER])
    )
    assert whole == rest


def test_a_begun_assistant_message_is_continued_as_in_a_rollout(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = [USER, {"role": "assistant", "content": "1 +"}]
    [rollout] = prompts_from_rows([{"prompt": prompt}], DataSettings(), chat_tokenizer)
    for completion in (" 2", [{"role": "assistant", "content": " 2"}]):
        [example] = examples_from_rows([{"prompt": prompt, "completion": completion}], DataSettings(), chat_tokenizer)
        assert example.token_ids[: len(rollout.token_ids)] == rollout.token_ids
        assert taught(example, chat_tokenizer) == " 2<|im_end|>"
    for several in ([ANSWER, ANSWER], [ANSWER | {"tool_calls": [{"name": "x"}]}]):
        with pytest.raises(DataError, match="ends with the assistant's message, which a single text must continue"):
            examples_from_rows([{"prompt": prompt, "completion": several}], DataSettings(), chat_tokenizer)


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ([USER, ANSWER], [USER, {"role": "assistant", "content": "b"}]),
        ([{"role": "system", "content": "x"}], [USER, {"role": "assistant", "content": "b"}]),
        ([USER, ANSWER], [{"role": "tool", "content": "x"}, {"role": "assistant", "content": "b"}]),
    ],
)
def test_turns_that_follow_a_prompt_are_a_completion(
    prompt: Any, completion: Any, chat_tokenizer: PreTrainedTokenizerFast
) -> None:
    [example] = examples_from_rows([{"prompt": prompt, "completion": completion}], DataSettings(), chat_tokenizer)
    assert taught(example, chat_tokenizer) == "b<|im_end|>"
    whole = chat_tokenizer.apply_chat_template([*prompt, *completion], tokenize=False).rstrip()
    assert chat_tokenizer.decode(example.token_ids) == whole


def test_a_template_that_ends_no_turn_gets_one_eos(framing_tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = examples_from_rows([{"prompt": "hi", "answer": "yo"}], DataSettings(), framing_tokenizer)
    assert framing_tokenizer.decode(example.token_ids) == "<bos>[user]hi[assistant]yo<|endoftext|>"
    assert taught(example, framing_tokenizer) == "yo<|endoftext|>"


def test_plain_text_is_framed_once(framing_tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "hi", "answer": "yo"}
    (example,) = examples_from_rows([row], DataSettings(chat=False), framing_tokenizer)
    assert framing_tokenizer.decode(example.token_ids) == "<bos>hiyo<|endoftext|>"
    assert taught(example, framing_tokenizer) == "yo<|endoftext|>"


def test_a_token_is_not_merged_over_the_end_of_the_prompt(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(plain_tokenizer("at")["input_ids"]) == 1
    (example,) = examples_from_rows([{"prompt": "What is a", "answer": "t 1"}], DataSettings(), plain_tokenizer)
    assert taught(example, plain_tokenizer) == "t 1<|endoftext|>"
    assert example.token_ids[:-4] == tuple(plain_tokenizer("What is a")["input_ids"])


def test_an_unstable_template_is_refused(
    chat_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_tokenizer, "chat_template", "{{ messages | length }}" + str(chat_tokenizer.chat_template))
    with pytest.raises(DataError, match=r"row 0 .*cannot be told apart"):
        examples_from_rows([{"messages": [USER, ANSWER]}], DataSettings(), chat_tokenizer)


@pytest.mark.parametrize(
    ("row", "reason", "named"),
    [
        ({"prompt": "hi"}, "missing_column", "no column 'completion' and no column 'answer'"),
        ({"prompt": "hi", "answer": " "}, "empty", "empty string in the column 'answer'"),
        ({"prompt": "hi", "answer": ["72", "73"]}, "wrong_type", "list in the column 'answer', of which no text"),
        ({"prompt": "hi", "answer": {"text": "72"}}, "wrong_type", "dict in the column 'answer'"),
        ({"prompt": "hi", "answer": b"72"}, "wrong_type", "bytes in the column 'answer'"),
        ({"prompt": "hi", "answer": np.array([7, 2])}, "wrong_type", "ndarray in the column 'answer'"),
        ({"prompt": "hi", "completion": ""}, "empty", "empty string in the column 'completion'"),
        ({"messages": [USER]}, "empty", "no message of the assistant's"),
        ({"messages": [USER, BLANK]}, "empty", "an empty message of the assistant's"),
        ({"prompt": [USER, ANSWER], "completion": [BLANK]}, "empty", "an empty message of the assistant's"),
        ({"prompt": "hi", "completion": [USER]}, "empty", "nothing in a completion after the prompt"),
        ({"prompt": "ho", "completion": [USER, ANSWER]}, "other_prompt", "begins with the user's message, and not"),
        ({"prompt": [USER, USER], "completion": [USER, ANSWER]}, "other_prompt", "begins with the user's message"),
        ({"messages": [ANSWER]}, "empty", "begins with the assistant's message"),
        ({"prompt": "1" * 99, "answer": "3"}, "too_long", "max_prompt_tokens is 60"),
    ],
)
def test_bad_rows(chat_tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], reason: str, named: str) -> None:
    rows = [{"prompt": "hi", "answer": "yo"}, row]
    with pytest.raises(DataError, match=f"row 1 .*{named}"):
        examples_from_rows(rows, DataSettings(max_prompt_tokens=60), chat_tokenizer)
    dataset = examples_from_rows(rows, DataSettings(max_prompt_tokens=60, on_bad_row="skip"), chat_tokenizer)
    assert len(dataset) == 1 and dataset.skipped == {reason: 1}


@pytest.mark.parametrize("answer", [72, np.int64(72), torch.tensor(72), Decimal(72), "72"])
def test_a_numeric_answer_is_rendered_as_its_digits(
    chat_tokenizer: PreTrainedTokenizerFast, answer: Any
) -> None:
    example = examples_from_rows([{"prompt": "hi", "answer": answer}], DataSettings(), chat_tokenizer)[0]
    taught = [token for token, is_taught in zip(example.token_ids, example.completion_mask, strict=True) if is_taught]
    assert chat_tokenizer.decode(taught) == "72<|im_end|>"


def test_a_duplicate_end_token_is_trained_on_once(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    twice = copy.deepcopy(chat_tokenizer)
    twice.chat_template += "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    twice.chat_template = twice.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    for tokenizer, text in ((chat_tokenizer, "3<|im_end|>"), (twice, "3")):
        for row in ({"prompt": "hi", "completion": text}, {"messages": [USER, {"role": "assistant", "content": text}]}):
            example = examples_from_rows([row], DataSettings(), tokenizer)[0]
            assert example.token_ids.count(tokenizer.eos_token_id) == 2, tokenizer.decode(example.token_ids)
            assert example.token_ids[-1] == tokenizer.eos_token_id and example.completion_mask[-1]


@pytest.mark.parametrize("column", ["reasoning", "reasoning_content", "thinking"])
def test_a_column_of_thoughts_that_is_not_trained_on_is_logged_once(
    chat_tokenizer: PreTrainedTokenizerFast, column: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "hi", "completion": "yo", column: "a thought"}] * 3
    with caplog.at_level(logging.WARNING):
        examples_from_rows(rows, DataSettings(), chat_tokenizer)
    assert len(caplog.records) == 1 and f"the column {column!r} is not taught" in caplog.text


def test_a_chat_completion_needs_a_chat_prompt(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="prompts are plain here"):
        examples_from_rows([{"prompt": "hi", "completion": [ANSWER]}], DataSettings(), plain_tokenizer)


def test_the_answer_template_needs_its_placeholder(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"must contain \{answer\}"):
        examples_from_rows([], DataSettings(), plain_tokenizer, answer_template="x")


def test_a_task_trains_on_its_answers(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    settings = DataSettings(task="chain_sum", size=3)
    dataset = load_examples(settings, plain_tokenizer, answer_template=" {answer}")
    answers = [row["answer"] for row in load_rows(settings)]
    assert [taught(example, plain_tokenizer) for example in dataset] == [f" {a}<|endoftext|>" for a in answers]
