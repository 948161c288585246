"""Rows whose values are nested too deeply to be followed."""

from typing import Any

import pytest

from alignlab.config.data import RenderSettings
from alignlab.data.nesting import MAX_DEPTH, is_too_deep, parse_json
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import DataError
from alignlab.loop.given_data import given_prompts, resolve_prompts

TEXT = "[" * 100_000
CHAT = [{"role": "user", "content": "x"}]


def nested(levels: int) -> Any:
    value: Any = "end"
    for level in range(levels):
        value = {"a": value} if level % 2 else [value, value]
    return value


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT, "tools": TEXT},
        {"prompt": CHAT, "chat_template_kwargs": TEXT},
        {"prompt": "x", "column": nested(100_000)},
        {"prompt": CHAT, "tools": [nested(100_000)]},
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "a", "more": nested(100_000)}]}]},
        {"prompt": CHAT, "tools": "[" * 500 + "]" * 500},
    ],
)
def test_a_row_that_is_nested_too_deeply_is_a_bad_row(row: dict[str, Any]) -> None:
    tokenizer = train_tokenizer(["ab"], vocab_size=262)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ tools }}"
    with pytest.raises(DataError, match=r"row 0 .*(nested deeper than 100 levels|nested too deeply)"):
        resolve_prompts(given_prompts([row], None), tokenizer)
    with pytest.raises(DataError, match=r"no usable|none|holds no"):
        resolve_prompts(given_prompts([row], RenderSettings(on_bad_row="skip")), tokenizer)


def test_the_depth_limit_is_exact() -> None:
    assert not is_too_deep(nested(MAX_DEPTH)) and is_too_deep(nested(MAX_DEPTH + 1))
    own: list[Any] = []
    own.append(own)
    assert is_too_deep(own)
    assert parse_json('{"a": [1]}') == {"a": [1]}
    with pytest.raises(ValueError, match="deeper than 100 levels"):
        parse_json("[" * 101 + "]" * 101)
