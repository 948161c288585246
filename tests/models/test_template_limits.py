"""Chat templates that would run for ever or fill memory."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from alignlab.config.data import RenderSettings
from alignlab.data.rendering import PromptRenderer
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import DataError
from alignlab.models.hub import template_limits
from alignlab.models.hub.template_limits import render_template, within_limits
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
        growing = NESTED.replace("{BODY}", "{% set ns.x = ns.x + [i ~ 'abcd' * 9999] %}")
        render_template(with_template("{% set ns = namespace(x=[]) %}" + growing), CHAT)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("ok\n{{ 9 ** 9 ** 9 }}", r"line 2 of the chat template raises to a power"),
        ("{{ 'a' * 1000_000_000 }}", "holds the number 1000_000_000, and numbers must be at most 1000000"),
        ("{{ 'a' * 0xffffffff }}", "holds the number 0xffffffff"),
        ("{{ 1e99 }}", "holds the number 1e99"),
        ("{{ " + "9" * 5000 + " }}", "holds the number 9999"),
        ("a" * (2**20 + 1), "must have at most 1048576 characters, and has 1048577"),
        ("{% for i in range(20000) %}" + "abc" * 300 + "{% endfor %}", "16777216 characters, and would make 167"),
    ],
)
def test_a_template_of_one_endless_step_or_an_endless_text_is_refused(
    template: str, named: str, with_template: Any
) -> None:
    with pytest.raises(DataError, match=named):
        render_template(with_template(template), CHAT)


LONG = "{% set a = 'a' * 999999 %}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ '%10000000000d' % 1 }}", "{{ '%*d' % (10 * 999999999, 1) }}", "{{ '%.99999999f' % 1 }}",
        "{{ '%99999999d' | format(1) }}", "{{ '{:>10000000000}'.format(1) }}", "{{ '{:>{}}'.format(1, a | length) }}",
        "{{ '{0.x:>99999999}'.format(1) }}", "{{ '{:>99999999}'['format'](1) }}",
        "{{ ('{x}' * 99).format_map({'x': a}) }}",
        "{{ ('%(x)s' * 99) % {'x': a} }}", "{{ a * 100 }}", "{{ 100 * a }}", "{{ [1] * 999999 * 9 }}",
        "{% set b = a * 10 %}{{ b + b }}", "{{ " + "a ~ " * 99 + "a }}", "{{ a }}" * 99,
        "{% set b %}" + "{{ a }}" * 99 + "{% endset %}", "{{ [a] * 999 }}", "{{ namespace(x=[a] * 999) }}",
        "{{ ([a] * 999) | string }}", "{{ ([a] * 999) | tojson }}", "{{ {'x': [a] * 999}.items() }}",
        "{{ a | replace('a', a) }}", "{{ a.replace('a', a) }}", "{{ a.replace('', 'x' * 99) }}", "{{ a | join(a) }}",
        "{{ a.join(a) }}", "{{ range(999) | join(a) }}", "{{ 'x' | center(99999 * 999) }}",
        "{{ 'x'.ljust(99999 * 999) }}",
        "{{ 'x'.zfill(99999 * 999) }}", "{{ 'x'['rjust'](99999 * 999) }}", "{{ ('x' | attr('center'))(99999 * 999) }}",
        "{{ 'x'.encode().center(99999 * 999) }}", "{{ ['x'] | map('center', 99999 * 999) | list }}",
        "{{ ('\t' * 99999).expandtabs(99999) }}", "{{ a.translate({97: a}) }}", "{{ (1).to_bytes(99999 * 999) }}",
        "{{ ('x\n' * 99999) | indent(99999) }}", "{{ ('x\n' * 999) | indent(a) }}",
        "{{ range(3) | batch(99999 * 999, 'x') | list }}", "{{ (a * 9) | wordwrap(1) }}",
        "{{ (a * 9) | wordwrap(1, True, a) }}",
        "{{ (a * 9).split() }}", "{{ (a * 9) | list }}", "{{ [1] | tojson(indent=99999) }}", "{{ 1.5 | round(99999) }}",
        "{{ ([[1] * 999999] * 9) | sum(start=[]) }}", "{{ ('9' * 99999) | int(0, 16) }}",
    ],
)  # fmt: skip
def test_a_step_that_makes_too_much_is_refused_before_it_is_done(template: str, with_template: Any) -> None:
    with pytest.raises(DataError, match=r"use a tokenizer with another chat template, or correct this one"):
        render_template(with_template(LONG + template), CHAT)


DOUBLED = (
    "{% set ns = namespace(a=[1], b=[1], t=(1,)) %}{% for i in range(26) %}"
    "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}"
)
"""Of a few lists, which printed would be of 2**26 items: to compare two of them takes as many steps."""


@pytest.mark.parametrize(
    "template",
    [
        "{{ ns.a == ns.b }}", "{{ ns.a != ns.b }}", "{{ ns.a < ns.b }}", "{{ [] < ns.a <= ns.b }}",
        "{{ ns.a in [ns.b] }}", "{{ ns.a not in (ns.b,) }}", "{{ ns.a in ([ns.b] | select) }}",
        "{{ [ns.b].index(ns.a) }}", "{{ (ns.b,).count(ns.a) }}", "{{ ns.a is eq(ns.b) }}", "{{ ns.a is in([ns.b]) }}",
        "{{ [ns.a] | select('equalto', ns.b) | list | length }}", "{{ {'x': ns.a} == {'x': ns.b} }}",
        "{{ [ns.a, ns.b] | sort | length }}", "{{ [ns.a, ns.b] | min | length }}", "{{ [ns.t] | unique | first }}",
        "{{ [{'x': ns.a}, {'x': ns.b}] | groupby('x') | length }}",
        "{{ {'a': ns.a, 'b': ns.b} | dictsort(by='value') | length }}",
        "{{ {ns.t: 1} | length }}", "{{ {}[ns.t] }}", "{{ {}.get(ns.t) }}", "{{ ns.t in {} }}",
        "{{ dict([(ns.t, 1)]) | length }}", "{{ dict([(ns.t, 1)] | select) | length }}",
        "{% for each in [ns.a, ns.b] %}{{ loop.changed(each) }}{% endfor %}",
    ],
)  # fmt: skip
def test_a_step_that_compares_too_much_is_refused_before_it_is_done(template: str, with_template: Any) -> None:
    with pytest.raises(DataError, match=r"must make at most \d+ .*; use a tokenizer with another chat template"):
        render_template(with_template(DOUBLED + template), CHAT)


@pytest.mark.parametrize(
    "template",
    [
        "{{ (a ~ 'b').rfind('b' ~ a) }}", "{{ a.rpartition('b' ~ a) | length }}", "{{ a.strip('b' * 99999) | length }}",
        "{{ a.startswith((a ~ 'b',) * 99) }}", "{{ ([a] * 16) | sort | length }}",
    ],
)
def test_a_search_in_a_text_that_compares_too_much_is_refused(template: str, with_template: Any) -> None:
    with pytest.raises(DataError, match=r"must make at most \d+ "):
        render_template(with_template("{% set a = 'a' * 999999 %}{% set a = a ~ a %}" + template), CHAT)


def test_a_chain_of_comparisons_computes_each_operand_once_and_no_more_than_it_needs(with_template: Any) -> None:
    template = "{% set c = cycler(1, 2) %}{{ 0 < c.next() < 9 }}{{ c.current }}{{ 2 < 1 < raise_exception('no') }}"
    assert render_template(with_template(template), CHAT) == "True2False"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ '%5d|%s' % (1, 'a') }}{{ '%(x)s' % {'x': 2} }}{{ '%s' | format('b') }}", "    1|a2b"),
        ("{{ '{:>3}{x}'.format(1, x=2) }}{{ '{x}'.format_map({'x': 3}) }}", "  123"),
        ("{{ 'a' ~ 1 ~ [2] }}{{ 'x' * 3 + 'y' }}{{ [1] * 2 + [3] }}{{ 7 // 2 - 1 }}", "a1[2]xxxy[1, 1, 3]2"),
        ("{{ [1, 2] | join('-') }}{{ [{'a': 1}] | join(attribute='a') }}{{ ','.join(['a', 'b']) }}", "1-21a,b"),
        ("{{ 'aba' | replace('a', 'c') }}{{ 'aba'.replace('a', 'c', 1) }}{{ 'a\nb' | indent(2) }}", "cbccbaa\n  b"),
        ("{{ {'a': [1]} | tojson(indent=1) }}{{ [1, 2] | sum }}{{ [{'a': 2}] | sum('a') }}",
         '{\n "a": [\n  1\n ]\n}32'),
        ("{{ 'x'.center(3) }}{{ 'a b'.split()[1] }}{{ ' a ' | trim | upper }}{{ messages[0] | items | list }}",
         " x bA[('role', 'user'), ('content', 'q')]"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{% set y %}{{ f(1) }}{% endset %}{{ y }}{{ 12 | string }}", "<1>12"),
        ("{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}", "q"),
        ("{{ 1 < 2 < 3 }}{{ 1 < 3 < 2 }}{{ 2 > 1 == 1 }}{{ 'a' in 'ab' }}{{ 3 not in [1, 2] }}{{ 2 in [1] | select }}",
         "TrueFalseTrueTrueTrueFalse"),
        ("{{ [3, 1] | sort(reverse=true) }}{{ ['b', 'A'] | sort }}{{ [{'x': 2}, {'x': 1}] | sort(attribute='x') }}",
         "[3, 1]['A', 'b'][{'x': 1}, {'x': 2}]"),
        ("{{ {'b': 1, 'a': 2} | dictsort }}{{ [1, 1, 2] | unique | list }}{{ [4, 2] | min }}{{ 'ab' | max }}",
         "[('a', 2), ('b', 1)][1, 2]2b"),
        ("{{ {'k': 1, 2: 3}.get('k') }}{{ {(1, 2): 3}[(1, 2)] }}{{ dict(a=1) }}{{ [1, 2].index(2) }}{{ x in [1] }}",
         "13{'a': 1}1False"),
        ("{% for i in [1, 1, 2] %}{{ loop.changed(i) }}{% endfor %}{{ [1, 2, 3] | select('gt', 1) | list }}",
         "TrueFalseTrue[2, 3]"),
        ("{{ 'a/b/c'.rsplit('/', 1) }}{{ ' a '.strip() }}{{ 'xax'.strip('x') }}{{ 'abc'.startswith(('b', 'a')) }}",
         "['a/b', 'c']aaTrue"),
        ("{{ strftime_now('%Y') | length }}{{ none }}{{ '' if no is defined else 'x' }}", "4Nonex"),
    ],
)  # fmt: skip
def test_limited_filters_and_methods_give_the_usual_results(template: str, text: str, with_template: Any) -> None:
    assert render_template(with_template(template), CHAT) == text


def test_usual_templates_are_rendered(with_template: Any) -> None:
    content = "{% if 1000000 > 0x10 %}{{ messages[0].content }}{% endif %}"
    template = "{# 10000000 ** #}10000000 **{{ 1_000 }}{{ '**' }}" + content
    assert render_template(with_template(template), CHAT) == "10000000 **1000**q"


def test_errors_of_a_template_are_raised_unchanged(with_template: Any) -> None:
    with pytest.raises(RecursionError):
        render_template(with_template("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}"), CHAT)
    with pytest.raises(Exception, match="refused"):
        render_template(with_template("{{ raise_exception('refused') }}"), CHAT)
