"""Chats as other programs and files have them: read as what they mean, refused by name, or said once."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignlab.config.data import RenderSettings
from alignlab.data.examples import examples_from_rows
from alignlab.data.preferences import preferences_from_rows
from alignlab.data.prompts import prompts_from_rows
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.data.unpaired import unpaired_from_rows
from alignlab.errors import ConfigError, DataError
from tests.data.chat_families import family_tokenizer

SETTINGS = RenderSettings(max_prompt_tokens=4096)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
WORSE = {"role": "assistant", "content": "no"}
CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAMES = CHATML.replace("<{{ m.role }}>", "<{{ m.role }}{{ ' ' + m.name if m.name else '' }}>")


def with_template(template: str) -> PreTrainedTokenizerFast:
    tokenizer = train_tokenizer(["What is 1 + 2 = 3", "user assistant system"], vocab_size=270)
    tokenizer.chat_template = template
    return tokenizer


def prompt_text(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **settings: Any) -> str:
    [prompt] = prompts_from_rows([row], RenderSettings(**settings), tokenizer)
    return str(tokenizer.decode(prompt.token_ids))


def taught_text(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], settings: RenderSettings = SETTINGS) -> str:
    [example] = examples_from_rows([row], settings, tokenizer)
    pairs = zip(example.token_ids, example.completion_mask, strict=True)
    return str(tokenizer.decode([token for token, is_taught in pairs if is_taught]))


# Fields beside a chat's own


@pytest.mark.parametrize(
    ("field", "value"),
    [("name", "Bob"), ("tool_call_id", "c1"), ("id", "m7"), ("annotations", [{"url": "x"}]), ("prefix", True)],
)
def test_a_field_that_the_template_ignores_is_logged_once(field, value, caplog):
    row = {"prompt": [{**USER, field: value}], "completion": [ANSWER]}
    examples_from_rows([row, row], SETTINGS, with_template(CHATML))
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1 and f"the field {field!r}" in said[0] and "message 0 (user)" in said[0]


def test_an_empty_or_rendered_field_is_not_logged(caplog):
    nothing = {**USER, "name": None, "id": "", "annotations": [], "refusal": None, "weight": 1}
    prompts_from_rows([{"prompt": [nothing]}], SETTINGS, with_template(CHATML))
    assert "<user Bob>" in prompt_text(with_template(NAMES), {"prompt": [{**USER, "name": "Bob"}]})
    assert caplog.records == []


def test_an_ignored_name_that_also_occurs_in_a_content_is_logged(caplog):
    prompts_from_rows([{"prompt": [{**USER, "content": "I am Bob", "name": "Bob"}]}], SETTINGS, with_template(CHATML))
    assert "the field 'name' ('Bob')" in caplog.text


def test_a_name_rendered_for_one_role_alone_is_logged_for_the_other(caplog):
    template = NAMES.replace("if m.name", "if m.name and m.role == 'user'")
    asked, said = {**USER, "name": "Bob"}, {**ANSWER, "name": "Eve"}
    prompts_from_rows([{"prompt": [asked, said, asked]}], SETTINGS, with_template(template))
    assert [record.getMessage().count("message 1 (assistant)") for record in caplog.records] == [1]


@pytest.mark.parametrize("field", ["images", "audio"])
def test_media_in_a_field_of_a_message_are_refused(field):
    with pytest.raises(DataError, match=rf"row 0 .*a message's field '{field}'"):
        prompts_from_rows([{"prompt": [{**USER, field: ["x.png"]}]}], SETTINGS, with_template(CHATML))


# Chats that are text


def row_of_text(write: Any) -> dict[str, Any]:
    return {
        "prompt": write([USER]), "completion": write([ANSWER]), "chosen": write([ANSWER]), "rejected": write([WORSE]),
    }


@pytest.mark.parametrize("write", [json.dumps, str, lambda chat: "\n " + json.dumps(chat, indent=1)])
def test_a_chat_written_as_text_is_parsed_by_every_reader_and_logged(write, caplog):
    tokenizer = family_tokenizer("chatml")
    given, text = row_of_text(lambda chat: chat), row_of_text(write)
    other = {"prompt": "why", "completion": "so", "label": False}
    with caplog.at_level(logging.WARNING):
        for read in (examples_from_rows, preferences_from_rows):
            assert read([text], SETTINGS, tokenizer)[0] == read([given], SETTINGS, tokenizer)[0]
        labelled = [unpaired_from_rows([row | {"label": "1"}, other], SETTINGS, tokenizer)[0] for row in (text, given)]
    assert labelled[0] == labelled[1]
    [first], [second] = (prompts_from_rows([row], SETTINGS, tokenizer) for row in (text, given))
    assert (first.token_ids, first.text) == (second.token_ids, second.text)
    assert "has a list of chat messages as text" in caplog.text


def test_a_conversation_written_as_text_is_parsed_in_messages_and_in_the_prompt_column():
    tokenizer, chat = family_tokenizer("chatml"), json.dumps([USER, ANSWER])
    whole = taught_text(tokenizer, {"messages": [USER, ANSWER]})
    assert taught_text(tokenizer, {"messages": chat}) == whole
    settings = SETTINGS.model_copy(update={"prompt_column": "conversations"})
    assert taught_text(tokenizer, {"conversations": chat}, settings) == whole


def test_text_that_looks_like_a_chat_and_cannot_be_parsed_is_refused():
    broken = "[{'role': 'user', 'content': 'hi'}\n {'role': 'assistant', 'content': 'yo'}]"  # pandas, of an array
    with pytest.raises(DataError, match=r"row 0 .*begins as a list of chat messages.*write it as JSON"):
        prompts_from_rows([{"prompt": broken}], SETTINGS, family_tokenizer("chatml"))


@pytest.mark.parametrize(
    "text",
    ["[1, 2, 3]", '[{"role": "admin", "content": "x"}]', '{"role": "user"}', '["role", "user"]', "[{role: user}]"],
)
def test_other_texts_are_not_parsed_as_chats(text):
    assert text in prompt_text(with_template(CHATML), {"prompt": text})


def test_a_chat_written_as_text_stays_text_with_chat_false():
    text = json.dumps([USER])
    assert prompt_text(with_template(CHATML), {"prompt": text}, chat=False) == text
    with pytest.raises(ConfigError, match="is a list of chat messages, and prompts are plain"):
        prompts_from_rows([{"prompt": text}], SETTINGS, train_tokenizer(["a"], vocab_size=270))


# Other names of speakers and columns


@pytest.mark.parametrize(
    ("role", "right"), [("User", "user"), ("ASSISTANT", "assistant"), ("human", "user"), ("gpt", "assistant")]
)
def test_a_misnamed_role_is_refused_with_the_right_name(role, right):
    row = {"messages": [{"role": role, "content": "hi"}, ANSWER]}
    with pytest.raises(DataError, match=f"row 0 .*has a message of the role '{role}'.* know as '{right}'; write that"):
        examples_from_rows([row], SETTINGS, family_tokenizer("chatml"))


def test_an_unusual_role_is_passed_to_the_template():
    assert "<ipython>hi" in prompt_text(with_template(CHATML), {"prompt": [{"role": "ipython", "content": "hi"}]})


def test_sharegpt_conversations_are_read():
    tokenizer = family_tokenizer("qwen2.5")
    settings = SETTINGS.model_copy(update={"prompt_column": "conversations"})
    chat = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    as_messages = [{"role": "system", "content": "Be brief."}, USER, ANSWER]
    [example] = examples_from_rows([{"conversations": chat}], settings, tokenizer)
    [expected] = examples_from_rows([{"messages": as_messages}], SETTINGS, tokenizer)
    assert example == expected
    called = [chat[1], {"from": "function_call", "value": '{"name": "look_up", "arguments": {"word": "sky"}}'}]
    assert '"arguments": {"word": "sky"}' in taught_text(tokenizer, {"conversations": called}, settings)


def test_a_prompt_that_ends_with_the_assistant_is_continued_by_its_completion():
    row = {"prompt": [USER, ANSWER], "completion": " ho"}
    assert taught_text(family_tokenizer("chatml"), row).startswith(" ho")


def test_a_prompt_that_ends_with_an_answer_is_logged_once(caplog):
    prompts_from_rows([{"prompt": [USER, ANSWER]}] * 2, SETTINGS, family_tokenizer("chatml"))
    assert [record.getMessage().count("ends with the assistant's message") for record in caplog.records] == [1]


def test_labelled_messages_are_a_prompt_and_its_completion():
    tokenizer = family_tokenizer("chatml")
    other = [{**USER, "content": "so"}, WORSE]
    rows = [{"messages": [USER, ANSWER], "label": True}, {"messages": other, "label": False}]
    apart = [{"prompt": row["messages"][:1], "completion": row["messages"][1:], "label": row["label"]} for row in rows]
    assert list(unpaired_from_rows(rows, SETTINGS, tokenizer)) == list(unpaired_from_rows(apart, SETTINGS, tokenizer))
    with pytest.raises(DataError, match=r"row 0 .*'messages' do not end with the assistant's.*add it"):
        unpaired_from_rows([{"messages": [USER], "label": True}], SETTINGS, tokenizer)


# Calls and thoughts in the form that a template knows

CALL = {"name": "look_up", "arguments": {"word": "sky"}}
OF_WRAPPED = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}{{ c.function.arguments | tojson }}]{% endfor %}",
)
OF_BARE = OF_WRAPPED.replace("c.function.", "c.")
FIELD_ALONE = CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content.split('</think>')[-1] }}",
)
CHANNELS = CHATML.replace(
    "{{ m.content }}", "{% if m.thinking %}|analysis {{ m.thinking }}|final {% endif %}{{ m.content }}"
)


@pytest.mark.parametrize("template", [OF_WRAPPED, OF_BARE])
@pytest.mark.parametrize("call", [CALL, {"type": "function", "id": "c1", "function": CALL}])
def test_a_call_is_written_with_or_without_its_wrapper(template, call):
    row = {"prompt": "q", "completion": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert '[look_up{"word": "sky"}]' in taught_text(with_template(template), row)


BARE_TOOL = {"name": "look_up", "description": "A word", "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("place", ["t.function", "t"])
@pytest.mark.parametrize(
    "tool", [BARE_TOOL, {"type": "function", **BARE_TOOL}, {"type": "function", "function": BARE_TOOL}]
)
@pytest.mark.parametrize("by_setting", [False, True])
def test_a_tool_is_written_with_or_without_its_wrapper(place, tool, by_setting):
    listed = f"[{{{{ {place}.name.strip() }}}}: {{{{ {place}.description }}}}]"
    tokenizer = with_template("{% for t in tools or [] %}" + listed + "{% endfor %}" + CHATML)
    given = {} if by_setting else {"tools": [tool]}
    text = prompt_text(tokenizer, {"prompt": "hi", **given}, tools=(tool,) if by_setting else ())
    assert text.startswith("[look_up: A word]")


@pytest.mark.parametrize("name", ["parameters", "input", "args"])
def test_arguments_under_another_name_are_renamed(name):
    call = {"name": "look_up", name: {"word": "sky"}}
    row = {"prompt": "q", "completion": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    assert '[look_up{"word": "sky"}]' in taught_text(with_template(OF_WRAPPED), row)


@pytest.mark.parametrize("content", ["<think>hm</think>yo", "<think>\nhm\n</think>\n\nyo", "hm</think>yo"])
@pytest.mark.parametrize(
    ("template", "written"), [(FIELD_ALONE, "<think>hm</think>yo"), (CHANNELS, "|analysis hm|final yo")]
)
def test_a_thought_in_tags_goes_to_the_field_that_the_template_reads(content, template, written):
    row = {"prompt": "q", "completion": [{"role": "assistant", "content": content}]}
    assert taught_text(with_template(template), row).startswith(written)


def test_a_thought_in_tags_stays_where_the_template_writes_contents_whole():
    row = {"prompt": "q", "completion": [{"role": "assistant", "content": "<think>hm</think>yo"}]}
    assert taught_text(with_template(CHATML), row).startswith("<think>hm</think>yo")


@pytest.mark.parametrize(
    ("family", "answer", "advises"),
    [
        ("chatml", {**ANSWER, "reasoning_content": "hm"}, True),
        ("deepseek r1", {**ANSWER, "reasoning_content": "hm"}, False),
        ("deepseek r1", {**ANSWER, "content": "<think>hm</think>yo"}, False),
    ],
)
def test_a_thought_that_is_left_out_is_refused_with_advice_that_helps(family, answer, advises):
    with pytest.raises(DataError, match=r"row 0 .*has the thought 'hm'") as caught:
        examples_from_rows([{"prompt": "q", "completion": [answer]}], SETTINGS, family_tokenizer(family))
    assert ("between <think> and </think>" in str(caught.value)) is advises


def test_thoughts_are_moved_to_the_channels_of_a_template_that_drops_earlier_ones():
    first, second = ({"role": "assistant", "content": f"<think>{word}</think>yo"} for word in ("one", "two"))
    row = {"messages": [USER, first, USER, second]}
    settings = SETTINGS.model_copy(update={"taught_turns": "last"})
    text = taught_text(family_tokenizer("harmony"), row, settings)
    assert "<|channel|>analysis<|message|>two" in text and "<think>" not in text
