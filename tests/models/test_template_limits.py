"""Chat templates that need not end."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from alignlab.config.render import RenderSettings
from alignlab.data.rendering import PromptRenderer
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import DataError
from alignlab.models import template_limits
from alignlab.models.template_limits import render_template, within_limits
from alignlab.rollout.detokenizer import special_ids

CHAT = [{"role": "user", "content": "q"}]
NESTED = "{% for i in range(99999) %}{% for j in range(99999) %}{BODY}{% endfor %}{% endfor %}"


@pytest.fixture
def with_template() -> Callable[[str], PreTrainedTokenizerBase]:
    def make(template: str) -> PreTrainedTokenizerBase:
        tokenizer = train_tokenizer(["abc abd ab ba 123"], vocab_size=262)
        tokenizer.chat_template = template
        return tokenizer

    return make


@pytest.mark.parametrize("use", ["render_template", "rows", "special ids", "another thread"])
def test_a_loop_without_an_end_is_stopped_wherever_a_template_is_rendered(
    use: str, with_template: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "CPU_LIMIT_S", 0.1)
    tokenizer = with_template(NESTED.replace("{BODY}", ""))
    errors: list[BaseException] = []

    def render() -> None:
        try:
            if use == "rows":
                PromptRenderer(RenderSettings(on_bad_row="skip"), tokenizer)("q")
            elif use == "special ids":
                special_ids(tokenizer)
            else:
                render_template(tokenizer, CHAT)
        except DataError as error:
            errors.append(error)

    if use == "another thread":
        thread = threading.Thread(target=render)
        thread.start()
        thread.join()
    else:
        render()
    assert "within 0.1 s, and the chat template has not ended by then; use a tokenizer with another" in str(errors[0])
    assert within_limits(lambda: sum(range(1000))) == 499500, "nothing is left to be raised"


def test_a_template_that_fills_memory_is_stopped(with_template: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_limits, "MEMORY_LIMIT_BYTES", 2**26)
    with pytest.raises(DataError, match=r"within 0\.0625 GiB of memory"):
        render_template(with_template(NESTED.replace("{BODY}", "{{ i ~ 'abcdefgh' * 9999 }}")), CHAT)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("ok\n{{ 9 ** 9 ** 9 }}", r"line 2 of the chat template raises to a power"),
        ("{{ 'a' * 1000_000_000 }}", "holds the number 1000_000_000, and numbers must be at most 1000000"),
        ("{{ 'a' * 0xffffffff }}", "holds the number 0xffffffff"),
        ("{{ 1e99 }}", "holds the number 1e99"),
        ("{{ " + "9" * 5000 + " }}", "holds the number 9999"),
        ("a" * (2**20 + 1), "must have at most 1048576 characters, and has 1048577"),
        ("{% for i in range(20000) %}" + "abc" * 300 + "{% endfor %}", "has written 18000000"),
    ],
)
def test_a_template_of_one_endless_step_or_an_endless_text_is_refused(
    template: str, named: str, with_template: Any
) -> None:
    with pytest.raises(DataError, match=named):
        render_template(with_template(template), CHAT)


def test_what_templates_do_is_let_through(with_template: Any) -> None:
    content = "{% if 1000000 > 0x10 %}{{ messages[0].content }}{% endif %}"
    template = "{# 10000000 ** #}10000000 **{{ 1_000 }}{{ '**' }}" + content
    assert render_template(with_template(template), CHAT) == "10000000 **1000**q"


def test_what_a_template_raises_comes_through(with_template: Any) -> None:
    with pytest.raises(RecursionError):
        render_template(with_template("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"), CHAT)
    with pytest.raises(Exception, match="refused"):
        render_template(with_template("{{ raise_exception('refused') }}"), CHAT)
