"""The environment in which chat templates are rendered: no step may write too long a text or list.

Operators, filters and methods that can make much of little are checked before they run, because a single step of native
code cannot be stopped.
"""

from __future__ import annotations

import collections.abc
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2.compiler import CodeGenerator
from jinja2.filters import make_attrgetter
from jinja2.runtime import LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from transformers.utils import chat_template_utils

from alignlab.models.hub.template_comparisons import (
    check_key,
    check_search,
    check_sorting,
    compare,
    comparing_tests,
    dict_of,
)
from alignlab.models.hub.template_sizes import (
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
"""Filters that do not print their value, or whose value is checked elsewhere."""
_COMPARING = frozenset(("sort", "min", "max", "unique", "groupby", "dictsort"))
_MAKERS = (dict, Namespace)
_SPLITTING = frozenset(("list", "striptags", "title", "urlize", "wordcount", "wordwrap"))


class _Generator(CodeGenerator):
    """Compiler of templates in which `~`, comparisons and dicts call the environment."""

    def visit_Concat(self, node: jinja2.nodes.Concat, frame: Any) -> None:
        """Write a call of `LimitedEnvironment.concat`, which checks the length first."""
        self.write("environment.concat((")
        for operand in node.nodes:
            self.visit(operand, frame)
            self.write(", ")
        self.write("))")

    def visit_Compare(self, node: jinja2.nodes.Compare, frame: Any) -> None:
        """Write calls of `compare`, each operand of `a < b < c` computed once, and only where it is needed."""
        names = [self.temporary_identifier() for _ in node.ops]
        self.write("(")
        for index, operand in enumerate(node.ops):
            self.write(f"{' and ' if index else ''}environment.compare({operand.op!r}, ")
            if index:
                self.write(names[index - 1])
            else:
                self.visit(node.expr, frame)
            self.write(f", ({names[index]} := ")
            self.visit(operand.expr, frame)
            self.write("))")
        self.write(")")

    def visit_Dict(self, node: jinja2.nodes.Dict, frame: Any) -> None:
        """Write a call of `dict_of`, which counts the keys first."""
        self.write("environment.dict_of((")
        for item in node.items:
            self.write("(")
            self.visit(item.key, frame)
            self.write(", ")
            self.visit(item.value, frame)
            self.write("), ")
        self.write("))")


class LimitedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox that raises `DataError` before a step would make more than `template_sizes` allows.

    Args:
        like: the environment from which filters, globals, extensions and handling of spaces are taken.
    """

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    code_generator_class = _Generator
    compare, dict_of = staticmethod(compare), staticmethod(dict_of)

    def __init__(self, like: jinja2.Environment) -> None:
        super().__init__(
            trim_blocks=like.trim_blocks, lstrip_blocks=like.lstrip_blocks, finalize=_printable,
            extensions=[type(extension) for extension in like.extensions.values()],
        )
        self.globals.update(like.globals)
        self.tests.update(comparing_tests())
        self.filters.update({name: _limited_filter(name, function) for name, function in like.filters.items()})

    @staticmethod
    def concat(values: Iterable[Any]) -> str:
        """Return values joined to a text, as a template, a block, a macro and the operator `~` do."""
        texts, size = [], 0
        for value in values:
            size += size_of(value)
            check(size, MAX_CHARS, "characters")
            texts.append(str(value))
        return "".join(texts)

    def call_binop(self, context: Any, operator: str, first: Any, second: Any) -> Any:
        """Return the result of a template's operator."""
        if operator == "%" and isinstance(first, str | bytes):
            check_printf(first, second)
        for number in (first, second):
            if isinstance(number, int):
                check(number.bit_length(), MAX_NUMBER_BITS, "bits of a number")
        if operator in ("+", "*"):
            _check_length(operator, first, second)
        return super().call_binop(context, operator, first, second)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return the `format` or `format_map` of a text, with a check of its arguments."""
        format_text = super().wrap_str_format(value)
        if format_text is None:
            return None

        def write(*args: Any, **kwargs: Any) -> str:
            values = [args[0]] if value.__name__ == "format_map" and args else [*args, *kwargs.values()]
            check_braces(value.__self__, values)
            return format_text(*args, **kwargs)

        return functools.update_wrapper(write, format_text)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """Return an item, whose key is counted first."""
        check_key(argument)
        return super().getitem(obj, argument)

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a template's function, after a check of the arguments if it is a method of a value."""
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str | bytes | int) and inspect.isbuiltin(__obj):
            args = check_method(owner, __obj.__name__, args, kwargs)
        elif inspect.isbuiltin(__obj) or any(__obj is maker for maker in _MAKERS) or isinstance(owner, LoopContext):
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
            _check_arguments(owner, args)
        return super().call(__context, __obj, *args, **kwargs)


def _check_arguments(owner: Any, args: tuple[Any, ...]) -> None:
    """Raise if a method of a list, a dict or a loop would compare or hash too much of its arguments."""
    if isinstance(owner, list | tuple) and args:
        check_search(args[0], owner)
    else:
        check(sum(map(size_of, args)), MAX_CHARS, "characters of arguments")


def _check_length(operator: str, first: Any, second: Any) -> None:
    """Raise if a sum or product of texts or lists would be too long."""
    operands = [operand for operand in (first, second) if isinstance(operand, str | bytes | list | tuple)]
    if not operands:
        return
    size = sum(map(len, operands))
    factors = [number for number in (first, second) if isinstance(number, int)]
    if factors and operator == "*":
        size *= max(factors[0], 0)
    if isinstance(operands[0], str | bytes):
        check(size, MAX_CHARS, "characters")
    else:
        check(size, MAX_ITEMS, "items")


def _printable(value: Any) -> Any:
    """Return a value that a template prints, unless it is too long."""
    check(size_of(value), MAX_CHARS, "characters")
    return value


def _limited_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter with a check of its value and arguments."""
    takes_context = getattr(function, "jinja_pass_arg", None) is not None
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        """Check the call, and make it."""
        context, (value, *options) = args[:takes_context], args[takes_context:]
        if name == "format":
            check_printf(str(value), kwargs or tuple(options))
            return function(*args, **kwargs)
        _check_value(name, value)
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:  # the filter raises it with its own message
            return function(*args, **kwargs)
        bound.apply_defaults()
        if name in ("join", "sum"):
            return _reduced(name, function, context, value, bound.arguments)
        if name in _COMPARING:
            return function(*context, _sortable(value), *options, **kwargs)
        check_arguments = _FILTERS.get(name)
        if check_arguments is not None:
            check_arguments(value, bound.arguments)
        return function(*args, **kwargs)

    return run


def _check_value(name: str, value: Any) -> None:
    """Raise if the value of a filter is too long to be printed, or a text too long to be split."""
    if name not in _PASSING:
        check(size_of(value), MAX_CHARS, "characters")
    if name in _SPLITTING and isinstance(value, str):
        check(len(value), MAX_SPLIT_CHARS, "characters of a text that is split")


def _sortable(values: Any) -> Any:
    """Return the values that a filter compares, a mapping as it is, unless there is too much to compare."""
    if isinstance(values, Mapping):
        check_sorting(list(values.items()))
        return values
    values = list(values)
    check_sorting(values)
    return values


def _reduced(
    name: str, function: Callable[..., Any], context: tuple[Any, ...], values: Any, arguments: Mapping[str, Any]
) -> Any:
    """Return what the filter `join` or `sum` makes of values."""
    environment = getattr(context[0], "environment", context[0])
    if arguments["attribute"] is not None:
        values = map(make_attrgetter(environment, arguments["attribute"]), values)
    if name == "sum":
        return _sum(environment, values, arguments["start"])
    values = list(values)
    check(sum(map(size_of, values)) + size_of(arguments["d"]) * len(values), MAX_CHARS, "characters")
    return function(*context, values, arguments["d"])


def _sum(environment: LimitedEnvironment, values: Iterable[Any], start: Any) -> Any:
    """Return a sum, made one step at a time, so that it can be stopped."""
    for value in values:
        start = environment.call_binop(None, "+", start, value)
    return start


_Arguments = Mapping[str, Any]


def _check_replace(value: Any, arguments: _Arguments) -> None:
    check_replacement(str(value), str(arguments["old"]), str(arguments["new"]), arguments["count"])


def _check_center(value: Any, arguments: _Arguments) -> None:
    check(arguments["width"], MAX_CHARS, "characters")


def _check_indent(value: Any, arguments: _Arguments) -> None:
    width = len(arguments["width"]) if isinstance(arguments["width"], str) else arguments["width"]
    text = str(value)
    check(len(text) + width * (len(text.splitlines()) + 1), MAX_CHARS, "characters")


def _check_int(value: Any, arguments: _Arguments) -> None:
    if isinstance(value, str):
        check(len(value), MAX_NUMBER_BITS // 8, "digits of a number")


def _check_items(name: str) -> Callable[[Any, _Arguments], None]:
    """Return the check of an argument that is a number of items."""
    return lambda value, arguments: check(arguments[name], MAX_ITEMS, "items")


def _check_small(*names: str) -> Callable[[Any, _Arguments], None]:
    """Return the check of arguments that are small numbers, short texts, or sequences of those."""

    def check_small(value: Any, arguments: _Arguments) -> None:
        for name in names:
            argument = arguments[name]
            is_one = isinstance(argument, str) or not isinstance(argument, collections.abc.Sequence)
            for item in (argument,) if is_one else argument:
                size = item if isinstance(item, int) else 0 if item is None else len(str(item))
                check(abs(size), MAX_SMALL, f"for {name}")

    return check_small


_FILTERS: dict[str, Callable[[Any, _Arguments], None]] = {
    "replace": _check_replace, "center": _check_center, "indent": _check_indent, "int": _check_int,
    "batch": _check_items("linecount"), "slice": _check_items("slices"), "round": _check_small("precision"),
    "wordwrap": _check_small("wrapstring"), "tojson": _check_small("indent", "separators"),
}  # fmt: skip


@functools.lru_cache
def _compiled(template: str) -> jinja2.Template:
    ordinary = chat_template_utils._cached_compile_jinja_template("")
    return LimitedEnvironment(ordinary.environment).from_string(template)


def limit_chat_templates() -> None:
    """Make transformers compile all chat templates for `LimitedEnvironment`, with its usual filters and functions."""
    assert hasattr(chat_template_utils, "_compile_jinja_template"), "transformers compiles templates elsewhere"
    chat_template_utils._compile_jinja_template = _compiled
