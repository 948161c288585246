"""Tools and calls of tools in rows, and columns of rows that the chat template reads."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

from transformers.utils import get_json_schema

from alignlab.data.bad_row import BadRow, check_characters
from alignlab.data.nesting import parse_json

logger = logging.getLogger(__name__)
_OF_ARGUMENTS = ("parameters", "input", "args")
"""Names of the field `arguments` of a call in other data."""


def tools_of(value: Any) -> list[dict[str, Any]]:
    """Return the schemas of the tools in a row's column: a list, or its JSON text, of schemas or Python functions.

    Raises:
        BadRow: the column holds something else, or a tool has no name.
    """
    value = _from_json(value, "tools")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow("wrong_type", f"has {type(value).__name__} in the column 'tools', which holds a list of tools")
    tools = [without_none(_tool(tool)) for tool in value]
    for tool in tools:
        if not tool_name(tool):
            raise BadRow("wrong_type", f"has a tool without a name in the column 'tools': {tool!r:.80}")
    check_characters(tools, "tools")
    return tools


def tool_name(tool: Mapping[str, Any]) -> str:
    """Return the name of a tool or of a call; empty if there is none."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else tool.get("name")
    return name if isinstance(name, str) else ""


def template_values_of(value: Any) -> dict[str, Any]:
    """Return the template's variables in a row's column `chat_template_kwargs`, without those that are None.

    Raises:
        BadRow: the column holds no mapping and no JSON text of one.
    """
    value = _from_json(value, "chat_template_kwargs")
    if not isinstance(value, Mapping):
        raise BadRow(
            "wrong_type",
            f"has {type(value).__name__} in the column 'chat_template_kwargs', which holds a mapping, such as "
            '{"enable_thinking": false}',
        )
    check_characters(value, "chat_template_kwargs")
    return {str(name): held for name, held in value.items() if held is not None}


def template_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a prompt that its chat template reads, as JSON, for rendering the row again.

    Columns of these names that no template can read are for rewards, and left out.
    """
    readable: dict[str, Any] = {}
    readers: dict[str, Callable[[Any], Any]] = {"tools": tools_of, "chat_template_kwargs": template_values_of}
    for name, read in readers.items():
        if columns.get(name) is not None:
            with suppress(BadRow):
                readable[name] = read(columns[name])
    return readable


def calls_of(value: Any) -> list[dict[str, Any]]:
    """Return a message's calls of tools; arguments that are a mapping, or JSON of one, become a mapping."""
    if value is None:
        return []
    value = _from_json(value, "tool_calls")
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadRow("wrong_type", f"has {type(value).__name__} in a message's tool_calls, which is a list of calls")
    return [_call(call) for call in value]


def legacy_calls_of(value: Any) -> list[dict[str, Any]]:
    """Return the call in OpenAI's older field `function_call` as a list of calls."""
    return [] if value is None else [_call({"type": "function", "function": value})]


def _call(call: Any) -> dict[str, Any]:
    call = _from_json(call, "tool_calls")
    if not isinstance(call, Mapping) or not tool_name(call):
        raise BadRow(
            "wrong_type",
            f"has the call {call!r:.80} in a message's tool_calls, where a call is "
            '{"type": "function", "function": {"name": ..., "arguments": {...}}}',
        )
    fields = {key: field for key, field in call.items() if field is not None}
    function = dict(fields["function"]) if isinstance(fields.get("function"), Mapping) else fields
    other_name = next((name for name in _OF_ARGUMENTS if name in function), None)
    if "arguments" not in function and other_name is not None:
        function["arguments"] = function.pop(other_name)
    if "arguments" in function:
        function["arguments"] = _arguments(function["arguments"])
    return {**fields, "function": function} if function is not fields else fields


def _arguments(value: Any) -> Any:
    """Return a mapping without null fields, for a mapping or the JSON text of one; any other value unchanged."""
    if isinstance(value, str):
        try:
            parsed = parse_json(value)
        except ValueError:
            return value
        return parsed if isinstance(parsed, dict) else value
    filled = without_none(value)
    if filled != value:
        _say_arguments_of_none()
    return filled


@cache
def _say_arguments_of_none() -> None:
    logger.warning(
        "arguments of tool calls that are null are left out, because tables of `datasets` fill up mappings with them; "
        "to keep a null, give the arguments as JSON text"
    )


def without_none(value: Any) -> Any:
    """Return a structure without fields that are None, with which tables of `datasets` fill up mappings."""
    if isinstance(value, Mapping):
        return {key: without_none(held) for key, held in value.items() if held is not None}
    if isinstance(value, list | tuple):
        return [without_none(held) for held in value]
    return value


def _from_json(value: Any, name: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise BadRow("wrong_type", f"has text in {name!r} that is no JSON: {error}; write it as JSON") from error


def _tool(tool: Any) -> Any:
    tool = _from_json(tool, "tools")
    if isinstance(tool, Mapping):
        return tool
    if callable(tool):
        try:
            return get_json_schema(tool)
        except Exception as error:  # no docstring, no type hints, ...
            raise BadRow("wrong_type", f"has a function in 'tools' that no schema can be made of: {error}") from error
    raise BadRow("wrong_type", f"has {type(tool).__name__} in 'tools', where a tool is a JSON schema or a function")
