"""Hostile inputs: files that a run reads, each with the content that it gets. Nothing here needs a network."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Callable
from itertools import pairwise
from typing import Any

Content = Callable[[bytes], bytes]
"""Makes a file's content from what it was."""
_DEEP, _MANY = 100_000, 300_000
_GIB = 1 << 30
MARK = "code-was-run"
"""A file of this name appears where an input's code is executed."""


def _text(text: str) -> Content:
    return lambda _: text.encode("utf-8", "surrogatepass")


def _replaced(old: str, new: str) -> Content:
    def replace(content: bytes) -> bytes:
        assert old.encode() in content, old
        return content.replace(old.encode(), new.encode())

    return replace


def _more(text: str) -> Content:
    return lambda content: content + text.encode("utf-8", "surrogatepass")


def _aliases() -> str:
    """Nine levels of nine: 3.9e8 items if it were written out."""
    names = "abcdefghi"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in pairwise(names)]
    return "\n".join(lines) + "\n"


def _with(**changes: Any) -> Content:
    """A JSON object with other entries; None leaves one out."""

    def change(content: bytes) -> bytes:
        said = json.loads(content) | changes
        return json.dumps({name: value for name, value in said.items() if value is not None}).encode()

    return change


def _header(length: int, text: bytes = b"") -> Content:
    return lambda content: struct.pack("<Q", length) + text + content[8:64]


def _lines(count: int) -> Content:
    return lambda content: gzip.compress(content.splitlines(keepends=True)[0] * count, compresslevel=9)


def _zeros(count: int) -> Content:
    return lambda _: gzip.compress(bytes(count), compresslevel=9)


_CONFIG: dict[str, Content] = {
    "alias-bomb": _more(_aliases()), "unknown-keys": _more("".join(f"k{i}: 1\n" for i in range(_MANY))),
    "deep-lists": _text("a: " + "[" * _DEEP), "deep-blocks": _text("".join(" " * i + "a:\n" for i in range(2000))),
    "recursive-alias": _more("extra: &a [*a]\n"), "merge-loop": _more("extra: &a\n  <<: *a\n"),
    "code": _more(f"extra: !!python/object/apply:os.mkdir ['{MARK}']\n"),
    "int-tag": _replaced("num_steps: 3", "num_steps: !!int x"),
    "impossible-date": _more("extra: 2026-13-45\n"), "digits": _replaced("num_steps: 3", f"num_steps: {'9' * 5000}"),
    "huge-float": _replaced("learning_rate: 0.01", "learning_rate: 1e400"),
    "nan": _replaced("learning_rate: 0.01", "learning_rate: .nan"),
    "base-60": _replaced("num_steps: 3", "num_steps: 1:30"),
    "zero-byte": _more("extra: \0\n"), "not-utf-8": lambda content: content + b"extra: \xff\xfe\n",
    "utf-16": lambda content: content.decode().encode("utf-16"), "empty": _text(""), "a-list": _text("- 1\n"),
    "a-number": _text("7\n"), "tabs": _text("model:\n\tname: x\n"), "twice": _more("model: {name: other}\n"),
    "surrogate": _more('extra: "\\uD800"\n'), "two-documents": _more("---\nmodel: 1\n"),
    "unclosed": _more("extra: [1, {\n"),
    "binary": lambda _: bytes(range(256)) * 16, "long-string": _more(f"extra: {'x' * 20_000_000}\n"),
    "key-is-a-list": _more("? [1, 2]\n: 3\n"), "set-tag": _more("extra: !!set {a, b}\n"),
    "omap": _more("extra: !!omap [a: 1]\n"),
    "path-with-zero": _replaced("output_dir: run", 'output_dir: "a\\0b"'),
    "long-path": _replaced("output_dir: run", f"output_dir: {'x' * 5000}"),
    "float-tag": _replaced("learning_rate: 0.01", "learning_rate: !!float x"),
    "timestamp-tag": _more("extra: !!timestamp x\n"), "bool-tag": _more("extra: !!bool x\n"),
    "binary-tag": _more("extra: !!binary '%'\n"), "pairs-tag": _more("extra: !!pairs x\n"),
}  # fmt: skip
_ROW = '{"prompt": "ab", "answer": "1"}\n'
_ROWS: dict[str, Content] = {
    "deep": _more('{"prompt": ' + "[" * _DEEP + "\n"),
    "deep-and-closed": _more('{"prompt": ' + "[" * _DEEP + "]" * _DEEP + "}\n"),
    "surrogate": _more('{"prompt": "\\ud800", "answer": "1"}\n'), "nan": _more('{"prompt": "a", "answer": NaN}\n'),
    "huge-number": _more('{"prompt": "a", "answer": 1e999}\n'),
    "digits": _more(f'{{"prompt": "a", "answer": {"9" * 5000}}}\n'),
    "twice": _more('{"prompt": "a", "prompt": "b", "answer": "1"}\n'),
    "zero-byte": _more('{"prompt": "a\\u0000b", "answer": "1"}\n'),
    "raw-zero-byte": _more("\0\n"), "not-utf-8": lambda content: content + b'{"prompt": "\xff", "answer": "1"}\n',
    "byte-order-mark": lambda content: b"\xef\xbb\xbf" + content, "empty": _text(""), "empty-lines": _more("\n\n \n"),
    "a-list": _more("[1, 2]\n"), "a-string": _more('"x"\n'), "null": _more("null\n"),
    "null-prompt": _more('{"prompt": null}\n'),
    "number-prompt": _more('{"prompt": 7, "answer": "1"}\n'), "no-prompt": _more('{"question": "a"}\n'),
    "empty-prompt": _more('{"prompt": "", "answer": "1"}\n'),
    "long-line": _more(json.dumps({"prompt": "a" * 30_000_000, "answer": "1"}) + "\n"), "cut": _more('{"prompt": "a'),
    "many-columns": _more(json.dumps({"prompt": "a"} | {f"c{i}": i for i in range(100_000)}) + "\n"),
    "special-tokens": _more('{"prompt": "<|endoftext|><|pad|>", "answer": "1"}\n'),
    "messages-odd": _more('{"prompt": [{"role": 7}]}\n'), "messages-empty": _more('{"prompt": []}\n'),
    "messages-nested": _more('{"prompt": [{"role": "user", "content": [[[{"type": "text"}]]]}]}\n'),
    "utf-16": lambda content: content.decode().encode("utf-16"), "binary": lambda _: bytes(range(256)) * 16,
}  # fmt: skip
_MODEL: dict[str, Content] = {
    "layers": _with(num_hidden_layers=10_000_000), "vocabulary": _with(vocab_size=10**12),
    "width": _with(hidden_size=10**9),
    "no-layers": _with(num_hidden_layers=0), "negative": _with(hidden_size=-16), "text": _with(hidden_size="16"),
    "null": _with(hidden_size=None),
    "fraction": _with(num_attention_heads=1.5), "indivisible": _with(num_attention_heads=3),
    "zero-heads": _with(num_attention_heads=0),
    "unknown-type": _with(model_type="no-such-model"), "no-type": _with(model_type=None),
    "list-type": _with(model_type=["llama"]),
    "own-code": _with(auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}),
    "positions": _with(max_position_embeddings=10**15), "no-positions": _with(max_position_embeddings=0),
    "rope": _with(rope_theta="x", rope_parameters={"rope_type": "x"}),
    "tied": _with(tie_word_embeddings="maybe"), "dtype": _with(dtype="complex64"), "eps": _with(rms_norm_eps=-1),
    "activation": _with(hidden_act="__import__"),
    "architectures": _with(architectures=["../../x"]), "deep": lambda _: b'{"a": ' * _DEEP, "a-list": _text("[]"),
    "empty": _text(""), "empty-object": _text("{}"),
    "nan": lambda content: content.replace(b'"hidden_size": 16', b'"hidden_size": NaN'),
    "not-utf-8": lambda content: content + b"\xff",
    "digits": lambda content: content.replace(b'"hidden_size": 16', b'"hidden_size": ' + b"9" * 5000),
    "pad": _with(pad_token_id=10**9), "end": _with(eos_token_id=-5),
    "quantised": _with(quantization_config={"quant_method": "no-such"}), "name": _with(_name_or_path="/etc/passwd"),
}  # fmt: skip
_WEIGHTS: dict[str, Content] = {
    "header-2^63": _header(1 << 63), "header-100-MB": _header(100_000_000), "header-of-nothing": _header(0),
    "header-is-a-list": _header(2, b"[]"), "header-deep": _header(_DEEP, b"[" * _DEEP),
    "cut": lambda content: content[:100],
    "overlapping": lambda _: _tensors({"a": [0, 8], "b": [4, 12]}), "beyond": lambda _: _tensors({"a": [0, 1 << 40]}),
    "backwards": lambda _: _tensors({"a": [8, 0]}), "pickle": lambda _: b"cos\nmkdir\n(S'" + MARK.encode() + b"'\ntR.",
    "empty": _text(""),
    "twice": lambda _: _tensors_text(b'{"a":%b,"a":%b}' % ((b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}',) * 2)),
}  # fmt: skip
_TOKENIZER: dict[str, Content] = {
    "deep": lambda _: b'{"a": ' * _DEEP, "empty": _text(""), "empty-object": _text("{}"), "a-list": _text("[]"),
    "cut": lambda content: content[:500],
    "no-model": _with(model=None), "type": _with(model={"type": "x"}), "version": _with(version="9.9"),
    "merges": _with(model={"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}),
    "regex": _with(
        pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    ),
    "bad-regex": _with(normalizer={"type": "Replace", "pattern": {"Regex": "("}, "content": ""}),
    "long-replacement": _with(normalizer={"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 1_000_000}),
    "added-ids": _with(
        added_tokens=[
            {"id": 10**9, "content": "x", "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        ]
    ),
}  # fmt: skip
_GENERATION: dict[str, Content] = {
    "temperature": _with(temperature=-1), "nan": lambda _: b'{"temperature": NaN}', "text": _with(top_p="x"),
    "a-list": _text("[]"), "empty": _text(""),
    "end-tokens": _with(eos_token_id=[10**9, -1]), "unknown": _with(no_such="x", trust_remote_code=True),
    "deep": lambda _: b'{"a": ' * _DEEP,
}  # fmt: skip
TEMPLATES = {
    "endless": "{% for i in range(10 ** 10) %}x{% endfor %}",
    "nested": "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}",
    "long": "{{ 'a' * 10 ** 10 }}", "power": "{{ 9 ** 9 ** 9 }}", "digits": "{{ (10 ** 100000) | string }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "doubling": "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "classes": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('" + MARK + "') }}",
    "lipsum": "{{ lipsum.__globals__['os'].mkdir('" + MARK + "') }}", "attr": "{{ messages | attr('__class__') }}",
    "syntax": "{% for %}", "undefined": "{{ no.such.thing }}", "raises": "{{ raise_exception('no') }}",
    "include": "{% include '/etc/passwd' %}", "import": "{% import 'os' as os %}",
    "padding": "{{ 'x' | center(10 ** 10) }}", "format": "{{ '%10000000000d' % 1 }}",
    "indent": "{{ ('a\\n' * 1000) | indent(10 ** 8) }}", "batch": "{{ range(3) | batch(10 ** 10, 'x') | list }}",
    "list": "{{ ([1] * 10 ** 10) | length }}", "join": "{{ range(10 ** 10) | join }}",
    "sort": "{{ range(10 ** 9) | sort | first }}", "empty": "", "nothing": "{{ '' }}", "surrogate": "{{ '\\ud800' }}",
    "replace": "{{ ('a' * 10000) | replace('a', 'a' * 1000000) }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "lipsum-long": "{{ lipsum(n=10 ** 9) }}",
    "tojson": "{{ range(10 ** 9) | list | tojson }}",
    "slice": "{{ range(10 ** 9) | slice(3) | list }}", "random": "{{ range(10 ** 9) | random }}",
    "wordwrap": "{{ ('a ' * 10 ** 7) | wordwrap(1) }}", "format-spec": "{{ '{:>10000000000}'.format(1) }}",
    "concat": "{% set a = 'a' * 999999 %}{{ " + "a ~ " * 20_000 + "a }}",
    "output": "{% set a = 'a' * 999999 %}" + "{{ a }}" * 20_000,
    "printed-list": "{% set a = 'a' * 999999 %}{{ [a] * 99999 }}",
    "join-long": "{% set a = 'a' * 999999 %}{{ a.join(a) }}",
    "translate": "{% set a = 'a' * 999999 %}{{ a.translate({97: a}) }}",
    "sum-lists": "{{ ([[1] * 999999] * 999999) | sum(start=[]) }}",
    "width-computed": "{{ 'x'.ljust(99999 * 999999) }}", "star": "{{ '%*d' % (99999 * 99999, 1) }}",
    "fill": "{{ range(3) | batch(99999 * 99999, 'x') | list }}", "precision": "{{ 1.5 | round(99999 * 9999) }}",
    "digits-tojson": "{{ [1] | tojson(indent=99999 * 99999) }}", "to-bytes": "{{ (1).to_bytes(99999 * 99999) }}",
    "shift": "{{ 1 << 10 ** 10 }}", "bytes": "{{ ('a' * 10 ** 9).encode() | length }}",
}  # fmt: skip
_CONSTITUTION: dict[str, Content] = {
    "empty": _text(""), "a-list": _text("[]"), "alias-bomb": _more(_aliases()),
    "code": _more(f"x: !!python/object/apply:os.mkdir ['{MARK}']\n"),
    "no-principles": _text("name: x\nprinciples: []\n"),
    "many": _text(f"name: x\nprinciples: [{'{name: a, prefer: b, rate: c, critique: d, revise: e}, ' * 20_000}]\n"),
    "deep": _text("[" * _DEEP), "not-utf-8": lambda _: b"\xff\xfe", "int-tag": _text("name: !!int x\n"),
    "zero-byte": _text('name: "a\\0"\nprinciples: []\n'), "digits": _text("9" * 5000),
    "date": _text("name: 2026-13-45\n"),
}  # fmt: skip


def _tensors(offsets: dict[str, list[int]]) -> bytes:
    told = {name: {"dtype": "F32", "shape": [2], "data_offsets": place} for name, place in offsets.items()}
    return _tensors_text(json.dumps(told).encode())


def _tensors_text(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + bytes(16)


FILES: dict[str, tuple[str, str, dict[str, Content]]] = {
    "config": ("grpo", "grpo.yaml", _CONFIG),
    "rows": ("grpo", "prompts.jsonl", _ROWS),
    "model": ("grpo", "policy/config.json", _MODEL),
    "weights": ("grpo", "policy/model.safetensors", _WEIGHTS),
    "tokenizer": ("grpo", "policy/tokenizer.json", _TOKENIZER),
    "generation": ("grpo", "policy/generation_config.json", _GENERATION),
    "constitution": ("rlaif", "constitution.yaml", _CONSTITUTION),
}
"""By subject: the run that reads the file, the file in `inputs`, and its contents by name."""
COMPRESSED: dict[str, Content] = {
    "bomb": _zeros(2 * _GIB), "bomb-of-lines": _lines(20_000_000),
    "cut": lambda content: gzip.compress(content)[:-20], "not-gzip": lambda content: content,
    "twice": lambda content: gzip.compress(gzip.compress(content)),
    "trailing": lambda content: gzip.compress(content) + b"x" * 100,
    "empty": _text(""), "whole": gzip.compress,
}  # fmt: skip
"""Of a file of rows that ends in .gz."""
TABLES: dict[str, tuple[str, Content]] = {
    "csv-zero-bytes": ("csv", lambda _: b"prompt,answer\na\0b,1\n"),
    "csv-twice": ("csv", lambda _: b"prompt,prompt\na,b\n"),
    "csv-long-field": ("csv", lambda _: b"prompt,answer\n" + b"a" * 10_000_000 + b",1\n"),
    "csv-ragged": ("csv", lambda _: b"prompt,answer\na\nb,c,d,e\n"),
    "csv-open-quote": ("csv", lambda _: b'prompt,answer\n"a,1\n'), "csv-empty": ("csv", lambda _: b""),
    "csv-not-utf-8": ("csv", lambda _: b"prompt\n\xff\n"),
    "parquet-cut": ("parquet", lambda _: b"PAR1" + bytes(50)),
    "parquet-footer": ("parquet", lambda _: b"PAR1" + bytes(20) + struct.pack("<I", 1 << 31) + b"PAR1"),
    "parquet-empty": ("parquet", lambda _: b""), "parquet-text": ("parquet", lambda _: _ROW.encode() * 50),
    "json-deep": ("json", lambda _: b"[" * _DEEP),
    "json-object": ("json", lambda _: b'{"prompt": "a"}'), "json-empty": ("json", lambda _: b""),
    "json-long": ("json", lambda _: b"[" + b'{"prompt":"a"},' * 200_000 + b'{"prompt":"a"}]'),
}  # fmt: skip
"""Of files of rows in other forms: suffix and content."""
