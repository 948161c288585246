"""The environment in which chat templates are rendered: no step writes more than a text or a list may have.

Each operator, filter and method that can make much of little tells what it will write before it does so: nothing can
stop a step of C once it has begun.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.filters import make_attrgetter
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers.utils import chat_template_utils

from alignlab.models.template_sizes import (
    MAX_CHARS,
    MAX_ITEMS,
    MAX_NUMBER_BITS,
    MAX_SMALL,
    MAX_SPLIT_CHARS,
    check,
    check_braces,
    check_method,
    check_printf,
    check_replacement,
    size_of,
)  # fmt: skip

_PASSING = frozenset(
    (
        "abs", "attr", "count", "d", "default", "dictsort", "first", "float", "groupby", "items", "last", "length",
        "map", "max", "min", "random", "reject", "rejectattr", "reverse", "round", "select", "selectattr", "slice",
        "sort", "sum", "unique", "join", "batch",
    )
)  # fmt: skip
"""Filters that write no text of their value, or are checked otherwise."""
_SPLITTING = frozenset(("list", "striptags", "title", "urlize", "wordcount", "wordwrap"))


class _Generator(CodeGenerator):
    """Python of templates in which `~` asks the environment."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        """Write a call of `LimitedEnvironment.concat`, which counts first."""
        self.write("environment.concat((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox in which no step makes more than `template_sizes` allows; it raises `DataError` instead.

    Args:
        like: the environment whose filters, globals, extensions and handling of spaces it has.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    code_generator_class = _Generator

    def __init__(self, like: jinja2.Environment) -> None:
        super().__init__(
            trim_blocks=like.trim_blocks, lstrip_blocks=like.lstrip_blocks, finalize=_printable,
            extensions=[type(extension) for extension in like.extensions.values()],
        )
        self.globals.update(like.globals)
        self.filters.update({name: _limited_filter(name, function) for name, function in like.filters.items()})

    @staticmethod
    def concat(parts: Iterable[Any]) -> str:
        """Return texts put together, as a template, a block, a macro and the operator `~` do."""
        texts, size = [], 0
        for part in parts:
            size += size_of(part)
            check(size, MAX_CHARS, "characters")
            texts.append(str(part))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return what an operator of a template makes."""
        if operator == "%" and isinstance(left, str | bytes):
            check_printf(left, right)
        for number in (left, right):
            if isinstance(number, int):
                check(number.bit_length(), MAX_NUMBER_BITS, "bits of a number")
        lengths = [(each, len(each)) for each in (left, right) if isinstance(each, str | bytes | list | tuple)]
        if lengths and operator in ("+", "*"):
            size = sum(length for _, length in lengths)
            times = [number for number in (left, right) if isinstance(number, int)]
            size *= max(times[0], 0) if times and operator == "*" else 1
            is_text = isinstance(lengths[0][0], str | bytes)
            check(size, MAX_CHARS if is_text else MAX_ITEMS, "characters" if is_text else "items")
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the `format` or `format_map` of a text, checked before it writes."""
        written = super().wrap_str_format(value)
        if written is None:
            return None

        def write(*args: Any, **kwargs: Any) -> str:
            given = [args[0]] if value.__name__ == "format_map" and args else [*args, *kwargs.values()]
            check_braces(value.__self__, given)
            return written(*args, **kwargs)

        return functools.update_wrapper(write, written)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call what a template calls; methods of texts and numbers say first how much they make."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int) and inspect.isbuiltin(__obj):
            args = check_method(owner, __obj.__name__, args, kwargs)
        return super().call(__context, __obj, *args, **kwargs)


def _printable(value: Any) -> Any:
    """Return a value that is to be printed."""
    check(size_of(value), MAX_CHARS, "characters")
    return value


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that says first how much it makes."""
    passes = getattr(function, "jinja_pass_arg", None) is not None
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        before, (value, *rest) = args[:passes], args[passes:]
        if name == "format":
            check_printf(str(value), kwargs or tuple(rest))
            return function(*args, **kwargs)
        if name not in _PASSING:
            check(size_of(value), MAX_CHARS, "characters")
        if name in _SPLITTING and isinstance(value, str):
            check(len(value), MAX_SPLIT_CHARS, "characters of a text that is split")
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # which the filter says itself
            return function(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        if name in ("join", "sum"):
            environment = getattr(before[0], "environment", before[0])
            if given["attribute"] is not None:
                value = map(make_attrgetter(environment, given["attribute"]), value)
            if name == "sum":
                return _sum(environment, value, given["start"])
            value = list(value)
            size = sum(map(size_of, value)) + size_of(given["d"]) * len(value)
            check(size, MAX_CHARS, "characters")
            return function(*before, value, given["d"])
        _check_filter(name, value, given)
        return function(*args, **kwargs)

    return run


def _sum(environment: LimitedEnvironment, values: Iterable[Any], start: Any) -> Any:
    """Return a sum, one step at a time, so that it can be stopped."""
    for value in values:
        start = environment.call_binop(None, "+", start, value)
    return start


def _check_filter(name: str, value: Any, given: Mapping[str, Any]) -> None:
    """Refuse a filter by the arguments that say how much it makes."""
    if name == "replace":
        check_replacement(str(value), str(given["old"]), str(given["new"]), given["count"])
    elif name == "center":
        check(given["width"], MAX_CHARS, "characters")
    elif name == "indent":
        width = len(given["width"]) if isinstance(given["width"], str) else given["width"]
        text = str(value)
        check(len(text) + width * (len(text.splitlines()) + 1), MAX_CHARS, "characters")
    elif name in ("batch", "slice"):
        check(given["linecount" if name == "batch" else "slices"], MAX_ITEMS, "items")
    elif name == "int" and isinstance(value, str):
        check(len(value), MAX_NUMBER_BITS // 8, "digits of a number")
    small = {"round": ("precision",), "wordwrap": ("wrapstring",), "tojson": ("indent", "separators")}.get(name, ())
    for each in small:
        held = given[each]
        for part in held if isinstance(held, collections.abc.Sequence) and not isinstance(held, str) else (held,):
            size = part if isinstance(part, int) else len(str(part)) if part is not None else 0
            check(abs(size), MAX_SMALL, f"for {each} of {name}")


@functools.lru_cache
def _compiled(template: str) -> jinja2.Template:
    made = chat_template_utils._cached_compile_jinja_template("")
    return LimitedEnvironment(made.environment).from_string(template)


def limit_chat_templates() -> None:
    """Have transformers compile all chat templates for `LimitedEnvironment`, with its own filters and functions."""
    assert hasattr(chat_template_utils, "_compile_jinja_template"), "transformers compiles templates elsewhere"
    chat_template_utils._compile_jinja_template = _compiled
