"""Families of chat templates, readers, kinds of rows: all of a row is in the tokens, or its loss is refused by name."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from alignlab.config.data import RenderSettings
from alignlab.data.examples import examples_from_rows
from alignlab.data.preferences import preferences_from_rows
from alignlab.data.prompts import prompts_from_rows
from alignlab.data.unpaired import unpaired_from_rows
from alignlab.errors import DataError
from tests.data.chat_families import FAMILIES, family_tokenizer

SETTINGS = RenderSettings(max_prompt_tokens=4096)
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The sky", "parameters": {"type": "object", "properties": {}}},
}
SYSTEM = {"role": "system", "content": "Be brief, please."}
ASKED = {"role": "user", "content": "Will it rain in Oslo?"}
ANSWER = {"role": "assistant", "content": "It will not."}
WORSE = {"role": "assistant", "content": "Perhaps."}
RESULT = {"role": "tool", "content": "sunny \"all day\""}


def calling(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


KINDS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]], bool]] = {
    # name: prompt, completion, whether there is a column of tools
    "one turn": ([ASKED], [ANSWER], False),
    "a system message": ([SYSTEM, ASKED], [ANSWER], False),
    "a second turn": ([ASKED, WORSE, {"role": "user", "content": "And tomorrow?"}], [ANSWER], False),
    "a call": ([ASKED], [calling({"city": "Oslo", "days": 3})], True),
    "a call in text": ([ASKED], [calling(json.dumps({"city": "Oslo", "days": 3}))], True),
    "a result": ([ASKED, calling({"city": "Oslo"}), RESULT], [ANSWER], True),
    "a call and its result": ([ASKED], [calling({"city": "Oslo"}), RESULT, ANSWER], True),
    "a thought": ([ASKED], [{**ANSWER, "reasoning_content": "No clouds."}], False),
    "a thought in tags": ([ASKED], [{**ANSWER, "content": "<think>\nNo clouds.\n</think>\n\nIt will not."}], False),
    "parts": (
        [{**ASKED, "content": [{"type": "text", "text": "Will it "}, {"type": "text", "text": "rain in Oslo?"}]}],
        [{**ANSWER, "content": [{"type": "text", "text": "It will not."}]}],
        False,
    ),
}
NO_TOOLS = ("a call", "a call in text", "a result", "a call and its result")
REFUSED: dict[str, dict[str, str]] = {
    # family: kind: what the refusal names
    "chatml": dict.fromkeys((*NO_TOOLS, "a thought"), "leaves it out"),
    "smollm": dict.fromkeys((*NO_TOOLS, "a thought"), "leaves it out"),
    "qwen2.5": {"a thought": "No clouds"},
    "qwen3": {"a call and its result": "before message 3 changes"},
    "qwen coder": {"a thought": "No clouds"},
    "llama 3": {"a thought": "No clouds"},
    "llama 2": {**dict.fromkeys(NO_TOOLS, "get_weather|alternate"), "a thought": "No clouds"},
    "gemma 2": {
        **dict.fromkeys(NO_TOOLS, "get_weather|alternate"), "a thought": "No clouds", "a system message": "System role",
    },
    "gemma 3": {**dict.fromkeys(NO_TOOLS, "get_weather|alternate"), "a thought": "No clouds"},
    "mistral": {"a thought": "No clouds"},
    "phi": dict.fromkeys((*NO_TOOLS, "a thought"), "leaves it out"),
    "deepseek r1": {
        **dict.fromkeys(NO_TOOLS, "the tool 'get_weather'"), "a thought": "No clouds", "a thought in tags": "No clouds",
    },
    "harmony": {},
    "granite": {"a thought": "No clouds"},
    "command r": dict.fromkeys((*NO_TOOLS, "a thought"), "leaves it out"),
    "smolvlm": dict.fromkeys((*NO_TOOLS, "a thought"), "leaves it out"),
}
CASES = [(family, kind) for family in FAMILIES for kind in KINDS]


def texts_of(messages: list[dict[str, Any]]) -> list[str]:
    """What has to be in the text of the messages, without white space; JSON may escape it."""
    held: list[str] = []
    for message in messages:
        content = message["content"]
        texts = [part["text"] for part in content] if isinstance(content, list) else [content or ""]
        held += [piece for text in texts for piece in text.replace("</think>", "<think>").split("<think>")]
        held.append(message.get("reasoning_content", ""))
        for call in message.get("tool_calls", ()):
            arguments = call["function"]["arguments"]
            parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
            held += [call["function"]["name"], *parsed, *map(str, parsed.values())]
    return [squeezed(text) for text in held if text.strip()]


def squeezed(text: str) -> str:
    return "".join(text.replace('\\"', '"').split())


def row_of(kind: str) -> dict[str, Any]:
    prompt, completion, has_tools = KINDS[kind]
    tools = {"tools": [TOOL]} if has_tools else {}
    return {"prompt": prompt, "completion": completion, "chosen": completion, "rejected": [WORSE], **tools}


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_every_part_of_a_row_is_rendered_or_the_row_refused(family: str, kind: str) -> None:
    tokenizer, (prompt, completion, has_tools) = family_tokenizer(family), KINDS[kind]
    row = row_of(kind)
    named = REFUSED[family].get(kind)
    if named is not None:
        with pytest.raises(DataError, match=f"row 0 .*({named})"):
            examples_from_rows([row], SETTINGS, tokenizer)
        with pytest.raises(DataError, match=f"row 0 .*({named})"):
            preferences_from_rows([row], SETTINGS, tokenizer)
        return
    [example] = examples_from_rows([row], SETTINGS, tokenizer)
    pairs = list(zip(example.token_ids, example.completion_mask, strict=True))
    taught = squeezed(tokenizer.decode([token for token, is_taught in pairs if is_taught]))
    read = squeezed(tokenizer.decode([token for token, is_taught in pairs if not is_taught]))
    said = [message for message in completion if message["role"] == "assistant"]
    others = [message for message in completion if message["role"] != "assistant"]
    assert [text for text in texts_of(said) if text not in taught] == []
    assert [text for text in texts_of([*prompt, *others]) if text not in read] == []
    assert "sunny" not in taught, "what a tool says is not taught"
    assert not has_tools or "get_weather" in read
    assert "{'" not in taught + read, "nothing is printed as Python does"
    assert example.token_ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(("family", "kind"), CASES)
def test_preferences_have_the_tokens_of_the_supervised_example(family: str, kind: str) -> None:
    tokenizer, row = family_tokenizer(family), row_of(kind)
    if kind in REFUSED[family]:
        pytest.skip("refused, see above")
    [example] = examples_from_rows([row], SETTINGS, tokenizer)
    first = example.completion_mask.index(True)
    [prompt] = prompts_from_rows([row], SETTINGS, tokenizer)
    [pair] = preferences_from_rows([row], SETTINGS, tokenizer)
    asked = {"tools": row["tools"]} if "tools" in row else {}
    bad = {"prompt": [{"role": "user", "content": "Why?"}], "completion": [WORSE], "label": False, **asked}
    labelled, _ = unpaired_from_rows([row | {"label": True}, bad], SETTINGS, tokenizer)
    mask = example.completion_mask[first:]
    for start, ids, own in (
        (pair.prompt, pair.chosen, pair.chosen_mask),
        (labelled.prompt, labelled.completion, labelled.completion_mask),
    ):
        assert (start, ids) == (example.token_ids[:first], example.token_ids[first:])
        assert (own or (True,) * len(ids)) == mask
    assert prompt.token_ids == example.token_ids[:first], "rollouts start where a taught completion does"


@pytest.mark.parametrize(
    ("family", "settings", "examples"),
    [("qwen3", "together", 0), ("qwen3", "separately", 2), ("qwen3", "last", 1), ("chatml", "together", 1)],
)
def test_turns_are_taught_together_or_separately(
    family: str, settings: Any, examples: int
) -> None:
    tokenizer = family_tokenizer(family)
    first = {"role": "assistant", "content": "<think>One cloud.</think>Yes."}
    second = {"role": "assistant", "content": "<think>No clouds.</think>No."}
    row = {"messages": [ASKED, first, {"role": "user", "content": "And tomorrow?"}, second]}
    if not examples:
        with pytest.raises(DataError, match="taught_turns='separately'"):
            examples_from_rows([row], SETTINGS, tokenizer)
        return
    dataset = examples_from_rows([row], SETTINGS.model_copy(update={"taught_turns": settings}), tokenizer)
    assert len(dataset) == examples
    for example, thought in zip(dataset, ("One", "No")[-examples:], strict=True):
        pairs = zip(example.token_ids, example.completion_mask, strict=True)
        assert thought in tokenizer.decode([token for token, is_taught in pairs if is_taught])
    history = tokenizer.decode(dataset[-1].token_ids)
    assert ("One cloud" in history) == (family == "chatml"), "the family cuts the thoughts of earlier turns"


def test_the_thought_of_an_earlier_turn_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    earlier = {"role": "assistant", "content": "Yes.", "reasoning_content": "One cloud."}
    row = {"prompt": [ASKED, earlier, {"role": "user", "content": "And tomorrow?"}]}
    with caplog.at_level(logging.WARNING):
        prompts_from_rows([{"prompt": [ASKED]}, row, row], SETTINGS, family_tokenizer("qwen3"))
    assert len(caplog.records) == 1
    assert "row 1" in caplog.text and "'One cloud.' of message 1" in caplog.text


def test_a_variable_of_the_template_is_set_for_all_rows_and_for_one() -> None:
    tokenizer = family_tokenizer("qwen3")
    off = SETTINGS.model_copy(update={"chat_template_kwargs": {"enable_thinking": False}})
    rows = [{"prompt": "q"}, {"prompt": "q", "chat_template_kwargs": {"enable_thinking": True}}]
    first, second = (tokenizer.decode(prompt.token_ids) for prompt in prompts_from_rows(rows, off, tokenizer))
    assert first == second + "<think>\n\n</think>\n\n"
