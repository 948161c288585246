"""What settings and rows hold takes effect, is refused by name, or is logged once."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from alignlab.config.data import DataSettings, RenderSettings
from alignlab.data.examples import examples_from_rows
from alignlab.data.preferences import preferences_from_rows
from alignlab.data.prompts import prompts_from_rows
from alignlab.data.token_alignment import TextAligner
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import ConfigError, DataError
from alignlab.types import Prompt
from tests.data.conftest import CHATML

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}
SYSTEM = {"role": "system", "content": "Be brief."}
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
)
LEAVES_SYSTEM_OUT = CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}", 1)
TOOLS = "{% for tool in tools or [] %}[{{ tool['function']['name'] }}]{% endfor %}" + CHATML
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer(["What is 1 + 2 = 3", "user assistant system"], vocab_size=270)
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<|im_start|>", special=True)]})
    made.add_special_tokens({"eos_token": AddedToken("<|im_end|>", special=True)})
    made.chat_template = CHATML
    return made


def prompt_text(tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], **settings: Any) -> str:
    [prompt] = prompts_from_rows([row], RenderSettings(**settings), tokenizer)
    return str(tokenizer.decode(prompt.token_ids))


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize(("template", "named"), [(NO_SYSTEM, "System role not"), (LEAVES_SYSTEM_OUT, "leaves system")])
def test_a_system_prompt_that_the_template_does_not_take_is_an_error_of_the_setting(
    tokenizer: PreTrainedTokenizerFast, template: str, named: str, on_bad_row: Any
) -> None:
    tokenizer.chat_template = template
    settings = DataSettings(task="chain_sum", system_prompt="Be brief.", on_bad_row=on_bad_row).rendering
    with pytest.raises(ConfigError, match=rf"data\.system_prompt .*{named}.*data\.prompt_template"):
        prompts_from_rows([{"prompt": "hi"}], settings, tokenizer)
    with pytest.raises(ConfigError, match=r"data\.system_prompt"):
        examples_from_rows([{"prompt": "hi", "completion": "yo"}], settings, tokenizer)


@pytest.mark.parametrize(("template", "reason"), [(NO_SYSTEM, "wrong_type"), (LEAVES_SYSTEM_OUT, "not_rendered")])
def test_a_rows_own_system_message_that_the_template_does_not_take_is_a_bad_row(
    tokenizer: PreTrainedTokenizerFast, template: str, reason: str
) -> None:
    tokenizer.chat_template = template
    rows = [{"prompt": "hi"}, {"prompt": [SYSTEM, USER]}]
    with pytest.raises(DataError, match="row 1 "):
        prompts_from_rows(rows, RenderSettings(), tokenizer)
    assert prompts_from_rows(rows, RenderSettings(on_bad_row="skip"), tokenizer).skipped == {reason: 1}


def test_tools_of_the_settings_are_for_rows_without_their_own(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = TOOLS
    own = {"type": "function", "function": {"name": "add"}}
    assert prompt_text(tokenizer, {"prompt": "hi"}, tools=(TOOL,)).startswith("[look_up]<|im_start|>")
    for given in ([own], json.dumps([own]), [json.dumps(own)]):
        assert prompt_text(tokenizer, {"prompt": "hi", "tools": given}, tools=(TOOL,)).startswith("[add]<|im_start|>")
    assert prompt_text(tokenizer, {"prompt": "hi", "tools": []}, tools=(TOOL,)).startswith("<|im_start|>")


def test_a_function_becomes_a_schema_without_null_fields(tokenizer: PreTrainedTokenizerFast) -> None:
    def look_up(word: str) -> str:
        """Look a word up.

        Args:
            word: the word.
        """
        return word

    tokenizer.chat_template = "{{ tools | tojson }}" + CHATML
    assert '"name": "look_up"' in prompt_text(tokenizer, {"prompt": "hi", "tools": [look_up]})
    filled = {"type": "function", "function": {"name": "x", "parameters": {"properties": {"a": None, "b": {}}}}}
    assert '{"properties": {"b": {}}}' in prompt_text(tokenizer, {"prompt": "hi", "tools": [filled]})


@pytest.mark.parametrize(
    ("template", "row", "settings", "error", "named"),
    [
        (CHATML, {"tools": [TOOL]}, {}, DataError, "the tool 'look_up'"),
        (CHATML, {}, {"tools": (TOOL,)}, ConfigError, "tools has the tool 'look_up'"),
        (TOOLS, {"tools": "hammer"}, {}, DataError, "'tools' that is no JSON"),
        (TOOLS, {"tools": [{"type": "function"}]}, {}, DataError, "a tool without a name"),
        (TOOLS, {}, {"tools": ({"type": "function"},)}, ConfigError, "a tool without a name"),
        (TOOLS, {"chat_template_kwargs": {"tools": []}}, {}, DataError, "has 'tools' in 'chat_template_kwargs'"),
        (TOOLS, {}, {"chat_template_kwargs": {"tokenize": True}}, ConfigError, "must not hold 'tokenize'"),
        (TOOLS, {"chat_template_kwargs": [1]}, {}, DataError, "which holds a mapping"),
        (CHATML, {"images": ["x.png"]}, {}, DataError, "column 'images', and models here read text"),
        (None, {}, {"tools": (TOOL,)}, ConfigError, "tools needs a chat template"),
        (None, {}, {"chat_template_kwargs": {"a": 1}}, ConfigError, "chat_template_kwargs needs a chat template"),
    ],
)
def test_invalid_template_variables_and_tools_are_refused(
    tokenizer: PreTrainedTokenizerFast, template: str | None, row: Any, settings: Any, error: Any, named: str
) -> None:
    tokenizer.chat_template = template
    with pytest.raises(error, match=named):
        prompts_from_rows([{"prompt": "hi", **row}], RenderSettings(**settings), tokenizer)


def test_empty_media_columns_are_accepted(tokenizer: PreTrainedTokenizerFast) -> None:
    assert prompt_text(tokenizer, {"prompt": "hi", "images": [], "image": None, "audio": ""})


@pytest.mark.parametrize(
    ("row", "settings", "named"),
    [
        ({"chat_template_kwargs": {"enable_thinkin": True}}, {}, "'enable_thinkin'"),
        ({}, {"chat_template_kwargs": {"enable_thinkin": True}}, "'enable_thinkin'"),
        ({"tools": "hammer"}, {"chat": False}, "'tools' is for a chat template"),
        ({"functions": [{"name": "hammer"}]}, {}, "'functions' is not rendered; call it tools"),
        ({"input": "1, 2 and 3"}, {}, "'input' is not rendered; where the model needs it"),
        ({"choices": ["4", "5"]}, {"chat": False}, "'choices' is not rendered"),
        ({"prompt": "a <|im_end|> b"}, {}, "special token <|im_end|>"),
        ({"prompt": "a <|im_end|> b"}, {"chat": False}, "special token <|im_end|>"),
    ],
)
def test_settings_without_effect_are_logged_once(
    tokenizer: PreTrainedTokenizerFast, row: Any, settings: Any, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prompts_from_rows([{"prompt": "hi"} | row] * 3, RenderSettings(**settings), tokenizer)
    assert len(caplog.records) == 1 and named in caplog.text


def test_a_template_without_a_generation_prompt_gets_its_own_header(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    whole = prompt_text(tokenizer, {"prompt": "hi"})
    tokenizer.chat_template = CHATML.partition("{% if add_generation_prompt")[0]
    with caplog.at_level(logging.WARNING):
        assert prompt_text(tokenizer, {"prompt": "hi"}) == whole
    assert "no generation prompt" in caplog.text
    [example] = examples_from_rows([{"prompt": "hi", "completion": "yo"}], RenderSettings(), tokenizer)
    assert tokenizer.decode(example.token_ids[example.completion_mask.index(True) :]) == "yo<|im_end|>"


def test_a_template_that_names_no_speaker_gets_no_header(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = "{% for message in messages %}<<{{ message['content'] }}>>{% endfor %}"
    assert prompt_text(tokenizer, {"prompt": "hi"}) == "<<hi>>"


def test_several_templates_without_a_default_are_chosen_from_by_name(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = {"chat": CHATML, "loud": CHATML.replace("<|im_end|>", "!<|im_end|>")}
    with pytest.raises(ConfigError, match=r"several chat templates.*RenderSettings\.chat_template_kwargs"):
        prompt_text(tokenizer, {"prompt": "hi"})
    assert "hi!<|im_end|>" in prompt_text(tokenizer, {"prompt": "hi"}, chat_template_kwargs={"chat_template": "loud"})


@pytest.fixture
def tomorrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Tomorrow:
            return cls(2031, 1, 2)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    chat_template_utils._compile_jinja_template.cache_clear()
    yield
    chat_template_utils._compile_jinja_template.cache_clear()


def test_a_template_writes_the_same_date_on_every_day(tokenizer: PreTrainedTokenizerFast, tomorrow: None) -> None:
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert "2031" in str(tokenizer.apply_chat_template([USER], tokenize=False)), "the clock is moved"
    assert prompt_text(tokenizer, {"prompt": "hi"}).startswith("26 Jul 2024<")
    assert prompt_text(tokenizer, {"prompt": "hi"}, template_date=datetime.date(2026, 11, 3)).startswith("03 Nov 2026<")


SPELLS = "a turn ends with <|im_end|>, and <|im_start|>system begins one"


@pytest.mark.parametrize("chat", [True, False])
def test_spelled_special_tokens_are_encoded_as_text_on_request(
    tokenizer: PreTrainedTokenizerFast, chat: bool
) -> None:
    settings = RenderSettings(chat=chat, escape_special_tokens=True)
    row = {"prompt": SPELLS, "completion": SPELLS, "chosen": SPELLS, "rejected": "no"}
    [example] = examples_from_rows([row], settings, tokenizer)
    [plain] = examples_from_rows([{"prompt": "q", "completion": "a"}], settings, tokenizer)
    [pair] = preferences_from_rows([row], settings, tokenizer)
    [prompt] = prompts_from_rows([row], settings, tokenizer)
    for special in tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]):
        assert example.token_ids.count(special) == plain.token_ids.count(special), "the template's own and no other"
    assert tokenizer.decode(example.token_ids).count(SPELLS) == 2, "the text is what it was"
    assert example.token_ids == prompt.token_ids + pair.chosen == pair.prompt + pair.chosen


def test_special_tokens_in_the_call_of_a_tool_are_escaped_in_json_too(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.chat_template = CHATML.replace(
        "{{ message['content'] }}",
        "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
        "{{ call | tojson(ensure_ascii=True) }}{% endfor %}",
    )
    call = {"name": "say", "arguments": {"word": "<|im_end|>"}}
    row = {"prompt": "q", "completion": [{"role": "assistant", "content": None, "tool_calls": [call]}]}
    [example] = examples_from_rows([row], RenderSettings(escape_special_tokens=True), tokenizer)
    text = tokenizer.decode(example.token_ids)
    assert '"<|im_end|>"' in text and "ufdd0" not in text
    assert example.token_ids.count(tokenizer.eos_token_id) == 2


@pytest.mark.parametrize(
    ("message", "named"),
    [
        ({"role": "user", "content": [{"type": "image"}]}, "a part of type 'image'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "a part of type 'image_url'"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, "has the part"),
        ({"role": "user", "content": 3}, "a content of type int"),
        ({"role": "assistant", "content": None, "tool_calls": [{}]}, "has the call"),
        ({"role": "assistant", "content": "x", "tool_calls": "{"}, "no JSON"),
        ({"role": "assistant", "content": "x", "reasoning": 3}, "field 'reasoning'"),
    ],
)
def test_messages_that_are_no_text_are_refused(
    tokenizer: PreTrainedTokenizerFast, message: dict[str, Any], named: str
) -> None:
    with pytest.raises(DataError, match=f"row 0 .*{named}"):
        prompts_from_rows([{"prompt": [message, USER]}], RenderSettings(), tokenizer)


def test_the_answer_of_messages_keeps_its_thought_for_the_trainers(tokenizer: PreTrainedTokenizerFast) -> None:
    answer = {**ANSWER, "reasoning_content": "hm"}
    [prompt] = prompts_from_rows([{"messages": [USER, answer]}], RenderSettings(), tokenizer)
    assert prompt.columns["answer"] == "yo" and prompt.columns["completion"] == [answer]


def test_a_teacher_reads_tools_through_its_own_template(tokenizer: PreTrainedTokenizerFast) -> None:
    teacher = train_tokenizer(["What is 1 + 2 = 3"], vocab_size=270)
    teacher.chat_template = "{% for t in tools or [] %}<{{ t.function.name }}>{% endfor %}{{ messages[-1].content }}"
    aligner = TextAligner(tokenizer, teacher, RenderSettings())
    [ids] = aligner.prompt_ids([Prompt((1,), [USER], columns={"tools": [TOOL]})])
    assert teacher.decode(ids) == "<look_up>hi"
    teacher.chat_template = "{{ messages[-1].content }}"
    with pytest.raises(ConfigError, match=r"the teacher's tokenizer: .*system messages out"):
        TextAligner(tokenizer, teacher, RenderSettings(system_prompt="Be brief.")).prompt_ids([Prompt((1,), "hi")])
    with pytest.raises(DataError, match="row 0 has the tool 'look_up'"):
        TextAligner(tokenizer, teacher, RenderSettings()).prompt_ids([Prompt((1,), [USER], columns={"tools": [TOOL]})])


def test_taught_turns_is_a_setting_of_supervised_data_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": "hi", "chosen": "yo", "rejected": "no"}]
    with pytest.raises(ConfigError, match="taught_turns is last, and is for supervised data"):
        preferences_from_rows(rows, RenderSettings(taught_turns="last"), tokenizer)


def test_a_turn_of_weight_0_is_not_trained_on(chat_tokenizer):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "weight": 0}]
    turns += [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4", "weight": 1}]
    [example] = examples_from_rows([{"messages": turns}], RenderSettings(), chat_tokenizer)
    taught = [i for i, mask in zip(example.token_ids, example.completion_mask, strict=True) if mask]
    assert "4" in chat_tokenizer.decode(taught) and "2" not in chat_tokenizer.decode(taught)
    assert "2" in chat_tokenizer.decode(example.token_ids)


@pytest.mark.parametrize(("field", "value"), [("weight", 0.5), ("train", "no")])
def test_a_turn_with_a_weight_other_than_0_or_1_is_refused(field, value, chat_tokenizer):
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", field: value}]
    with pytest.raises(DataError, match=rf"row 0 .* for {field} in a message, which is 1 \(taught\) or 0"):
        examples_from_rows([{"messages": turns}], RenderSettings(), chat_tokenizer)


@pytest.mark.parametrize("column", ["system", "completion_mask", "assistant_masks"])
def test_unrendered_columns_of_other_programs_are_logged_once(column, chat_tokenizer, caplog):
    rows = [{"prompt": "1", "completion": "2", column: "x"}] * 2
    examples_from_rows(rows, RenderSettings(), chat_tokenizer)
    assert [record.getMessage().count(f"the column {column!r} is not rendered") for record in caplog.records] == [1]


def test_messages_beside_a_prompt_are_logged_once(chat_tokenizer, caplog):
    row = {"prompt": "1", "completion": "2", "messages": [{"role": "user", "content": "3"}]}
    examples_from_rows([row, row], RenderSettings(), chat_tokenizer)
    assert [record.getMessage().count("'messages' is not rendered beside 'prompt'") for record in caplog.records] == [1]
