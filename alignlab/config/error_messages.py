"""Messages of broken rules: the rule, the value, the fix. They replace pydantic's messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from alignlab.config.moved_settings import moved_to
from alignlab.config.trl_names import PEER_NAMES, VERL_NAMES


class BrokenRule(ValueError):
    """A rule between fields that is broken; raised by validators.

    Args:
        field: the field to blame, relative to the validated class; dotted for a nested one.
        value: the value.
        must: the requirement, completing "and must ...".
        fix: an instruction what to write instead.
    """

    def __init__(self, field: str, value: object, must: str, fix: str) -> None:
        super().__init__(f"{field} is {show(value)}{MUST}{must}; {fix}")


MUST = ", and must "
SHOWN_RULES, LOOKED_AT = 20, 200
LONGEST_SHOWN = 80

# By pydantic's error type: the requirement, formatted with the error's context.
RULES = {
    "greater_than": "be greater than {gt}",
    "greater_than_equal": "be at least {ge}",
    "less_than": "be less than {lt}",
    "less_than_equal": "be at most {le}",
    "int_parsing": "be a whole number",
    "int_type": "be a whole number",
    "int_from_float": "be a whole number",
    "float_parsing": "be a number",
    "float_type": "be a number",
    "finite_number": "be a finite number",
    "bool_parsing": "be true or false",
    "bool_type": "be true or false",
    "string_type": "be a string",
    "path_type": "be a path",
    "tuple_type": "be a list",
    "dict_type": "be a mapping of names to values",
    "model_type": "be a mapping of {class_name}'s fields",
    "model_attributes_type": "be a mapping of fields",
    "literal_error": "be {expected}",
}


def show(value: object) -> str:
    """Return a value as messages quote it, cut to a readable length."""
    if isinstance(value, Path):
        value = str(value)
    try:
        text = "null" if value is None else str(value) if isinstance(value, bool | int | float) else repr(value)
    except ValueError:  # of a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def explain(error: ValidationError, model: type) -> str:
    """Return a line for each broken rule of `error`, raised while building `model`; at most `SHOWN_RULES` lines."""
    assert issubclass(model, BaseModel)
    details = error.errors(include_url=False)
    lines = _lines_by_path(details[:LOOKED_AT], model)
    if len(lines) == 1:
        return lines[0]
    is_cut = len(details) > LOOKED_AT or len(lines) > SHOWN_RULES
    count = f"more than {SHOWN_RULES}" if is_cut else str(len(lines))
    return f"{count} settings break a rule:\n" + "\n".join(f"  - {line}" for line in lines[:SHOWN_RULES])


def _lines_by_path(details: Sequence[Any], model: type[BaseModel]) -> list[str]:
    """Return a line for each setting that breaks a rule."""
    lines: dict[str, str] = {}
    for detail in details:
        path, line = _explain_one(detail, model)
        # The alternatives of a union fail one by one for one value: join their requirements.
        _, and_must, rule = line.partition(MUST)
        lines[path] = f"{lines[path]}, or{MUST.removeprefix(', and')}{rule}" if path in lines and and_must else line
    # If one alternative of a union failed further inside, the user meant that one.
    return [line for path, line in lines.items() if not any(longer.startswith(path + ".") for longer in lines)]


def _explain_one(detail: Mapping[str, Any], model: type[BaseModel]) -> tuple[str, str]:
    """Return the path of the setting to blame, and the message."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        *outer, key = detail["loc"]
        names, owners = _walk(outer, model)
        return ".".join((*names, str(key))), unknown_key(str(key), names, owners[0])
    names, owners = _walk(detail["loc"], model)
    path = ".".join(names)
    if kind == "value_error":
        return path, _joined(path, context["error"])
    if kind == "missing":
        return path, f"{path} is missing{MUST}be given{_purpose(names, model)}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        tag = show(context["tag"]) if "tag" in context else "missing"
        path = f"{path}.{context['discriminator'].strip(chr(39))}"
        return path, f"{path} is {tag}{MUST}be {' or '.join(str(_tag(owner)) for owner in owners)}"
    must = RULES[kind].format(**context) if kind in RULES else f"satisfy: {detail['msg']}"
    return path, f"{path or model.__name__} is {show(value)}{MUST}{must}{_fix(kind, value, context)}"


def _joined(path: str, cause: ValueError) -> str:
    """Return a validator's message, which names fields relative to the section, with the section's path."""
    if not path:
        return str(cause)
    return f"{path}.{cause}" if isinstance(cause, BrokenRule) else f"{path}: {cause}"


def _fix(kind: str, value: object, context: Mapping[str, Any]) -> str:
    if kind == "greater_than_equal":
        return f"; use {context['ge']} or more"
    if kind == "less_than_equal":
        return f"; use {context['le']} or less"
    if kind == "literal_error":
        close = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", context["expected"]), n=1)
        return f"; did you mean {close[0]}?" if close else ""
    return ""


def unknown_key(key: str, outer: list[str], owner: type[BaseModel]) -> str:
    """Return what to write instead of an unknown key of `owner`, a section at the path `outer`."""
    moved = moved_to(owner, key)
    if moved is not None:
        return f"{'.'.join((*outer, key))} is now {'.'.join((*outer, moved))}"
    refusal = f"{'.'.join((*outer, key))} is not a setting"
    peer = _peer_name(key, outer, owner)
    if peer:
        return f"{refusal}; what {'verl' if key in VERL_NAMES else 'TRL or PEFT'} calls {key} is here {peer}"
    elsewhere = _paths_to(key, owner)
    if elsewhere:
        return f"{refusal}; write it as {'.'.join((*outer, elsewhere[0]))}"
    close = difflib.get_close_matches(key, owner.model_fields, n=1) or _similar_below(key, owner)
    if close:
        return f"{refusal}; did you mean {'.'.join((*outer, close[0]))}?"
    return f"{refusal}; {owner.__name__} has: {', '.join(owner.model_fields)}"


def _peer_name(key: str, outer: list[str], owner: type[BaseModel]) -> str | None:
    """Return our name, as a path from the top, for another library's `key` in `owner` or below it."""
    name = PEER_NAMES.get(owner.__name__, {}).get(key)
    if name is not None:
        return name if " " in name else ".".join((*outer, name))
    below = ((field, model) for field, info in owner.model_fields.items() for model in models_in(info.annotation))
    answers = (_peer_name(key, [*outer, field], model) for field, model in below)
    return next(filter(None, answers), None)


def _paths_to(key: str, owner: type[BaseModel]) -> list[str]:
    """Return the dotted paths, below `owner`, of the fields called `key`."""
    paths = []
    for name, field in owner.model_fields.items():
        for inner in models_in(field.annotation):
            paths += [f"{name}.{key}"] if key in inner.model_fields else []
            paths += [f"{name}.{path}" for path in _paths_to(key, inner)]
    return paths


def _similar_below(key: str, owner: type[BaseModel]) -> list[str]:
    """Return the dotted path of a field like `key` in a section of `owner`, if there is one."""
    sections = (
        (name, inner) for name, field in owner.model_fields.items() for inner in models_in(field.annotation)
    )
    paths = {field: f"{name}.{field}" for name, inner in sections for field in inner.model_fields}
    return [paths[match] for match in difflib.get_close_matches(key, paths, n=1)]


def models_in(annotation: object) -> list[type[BaseModel]]:
    """Return the configuration classes that a field's annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _walk(loc: Iterable[int | str], model: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """Return the path that the user wrote for pydantic's location, and the classes that may stand there.

    A location also names the alternative of a union ("grpo", "str", a class), which no user wrote: it is left out.
    """
    names: list[str] = []
    candidates = [model]
    for key in loc:
        holder = next((model for model in candidates if key in model.model_fields), None)
        if isinstance(key, int):
            names.append(str(key))
        elif holder is not None:
            names.append(key)
            candidates = models_in(holder.model_fields[key].annotation) or candidates
        else:
            candidates = [model for model in candidates if key in (model.__name__, _tag(model))] or candidates
    return names, candidates


def _tag(model: type[BaseModel]) -> str | None:
    """Return the value by which a class is chosen among the alternatives of a section, if any."""
    names = [name for name in ("type", "engine") if name in model.model_fields]
    return model.model_fields[names[0]].default if names else None


def _purpose(names: list[str], model: type[BaseModel]) -> str:
    """Return the purpose of a missing setting, from its docstring or its class's."""
    *outer, last = names
    field = next(owner.model_fields[last] for owner in _walk(outer, model)[1] if last in owner.model_fields)
    docs = [field.description, *(section.__doc__ for section in models_in(field.annotation))]
    first = next((doc for doc in docs if doc), None)
    return f": {first.strip().splitlines()[0]}" if first else ""
