"""How a broken rule reads: the rule, the value, the fix. Replaces pydantic's messages."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from alignlab.config.peer_names import PEER_NAMES, VERL_NAMES


class BrokenRule(ValueError):
    """A rule between fields that does not hold; raised by validators.

    Args:
        field: the field to blame, relative to the validated class; dotted for a nested one.
        value: what it is.
        must: what it must be, completing "and must ...".
        fix: what to write instead.
    """

    def __init__(self, field: str, value: object, must: str, fix: str) -> None:
        super().__init__(f"{field} is {show(value)}{MUST}{must}; {fix}")


MUST = ", and must "
SHOWN_RULES, LOOKED_AT = 20, 200
LONGEST_SHOWN = 80

# By pydantic's error type: what the value must be, formatted with the error's context.
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
    """A value as messages quote it, cut to a readable length."""
    try:
        text = "null" if value is None else str(value) if isinstance(value, bool | int | float) else repr(value)
    except ValueError:  # of a whole number of more digits than Python writes
        return "a number of thousands of digits"
    return text if len(text) <= LONGEST_SHOWN else text[: LONGEST_SHOWN - 3] + "..."


def explain(error: ValidationError, model: type) -> str:
    """One line for each broken rule of `error`, raised while building `model`; the first `SHOWN_RULES` of many."""
    assert issubclass(model, BaseModel)
    details = error.errors(include_url=False)
    lines: dict[str, str] = {}
    for detail in details[:LOOKED_AT]:
        path, line = _explain_one(detail, model)
        # Alternatives of a union fail one by one, for one value: join what each wants.
        _, and_must, rule = line.partition(MUST)
        lines[path] = f"{lines[path]}, or{MUST.removeprefix(', and')}{rule}" if path in lines and and_must else line
    # Where an alternative of a union went deeper, the others are not what was meant.
    meant = [line for path, line in lines.items() if not any(other.startswith(path + ".") for other in lines)]
    if len(meant) == 1:
        return meant[0]
    many = len(details) > LOOKED_AT or len(meant) > SHOWN_RULES
    count = f"more than {SHOWN_RULES}" if many else str(len(meant))
    return f"{count} settings break a rule:\n" + "\n".join(f"  - {line}" for line in meant[:SHOWN_RULES])


def _explain_one(detail: Mapping[str, Any], model: type[BaseModel]) -> tuple[str, str]:
    """The path of the setting to blame, and the message."""
    kind, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    if kind == "extra_forbidden":
        *outer, key = detail["loc"]
        names, owners = _walk(outer, model)
        return ".".join((*names, str(key))), _unknown_key(str(key), names, owners[0])
    names, owners = _walk(detail["loc"], model)
    path = ".".join(names)
    if kind == "value_error":
        return path, _joined(path, context["error"])
    if kind == "missing":
        return path, f"{path} is missing{MUST}be given{_purpose(names, model)}"
    if kind in ("union_tag_not_found", "union_tag_invalid"):
        found = show(context["tag"]) if "tag" in context else "missing"
        path = f"{path}.{context['discriminator'].strip(chr(39))}"
        return path, f"{path} is {found}{MUST}be {' or '.join(str(_tag(each)) for each in owners)}"
    must = RULES[kind].format(**context) if kind in RULES else f"satisfy: {detail['msg']}"
    return path, f"{path or model.__name__} is {show(value)}{MUST}{must}{_fix(kind, value, context)}"


def _joined(path: str, cause: ValueError) -> str:
    """A validator's message, which names fields relative to the section at `path`."""
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


def _unknown_key(key: str, outer: list[str], owner: type[BaseModel]) -> str:
    """What to write instead of an unknown key of `owner`, which is found at `outer`."""
    known = list(owner.model_fields)
    what = f"{'.'.join((*outer, key))} is not a setting"
    peer = _peer_name(key, outer, owner)
    if peer:
        return f"{what}; what {'verl' if key in VERL_NAMES else 'TRL or PEFT'} calls {key} is here {peer}"
    elsewhere = _paths_to(key, owner)
    if elsewhere:
        return f"{what}; write it as {'.'.join((*outer, elsewhere[0]))}"
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"{what}; did you mean {'.'.join((*outer, close[0]))}?"
    return f"{what}; {owner.__name__} has: {', '.join(known)}"


def _peer_name(key: str, outer: list[str], owner: type[BaseModel]) -> str | None:
    """Our name, from the top, of what another library calls `key`, in `owner` or below it."""
    ours = PEER_NAMES.get(owner.__name__, {}).get(key)
    if ours is not None:
        return ours if " " in ours else ".".join((*outer, ours))
    below = ((name, model) for name, field in owner.model_fields.items() for model in models_in(field.annotation))
    return next((found for name, model in below if (found := _peer_name(key, [*outer, name], model))), None)


def _paths_to(key: str, owner: type[BaseModel]) -> list[str]:
    """Dotted paths, below `owner`, of the fields called `key`."""
    found = []
    for name, field in owner.model_fields.items():
        for inner in models_in(field.annotation):
            found += [f"{name}.{key}"] if key in inner.model_fields else []
            found += [f"{name}.{path}" for path in _paths_to(key, inner)]
    return found


def models_in(annotation: object) -> list[type[BaseModel]]:
    """The configuration classes that a field's annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in models_in(part)]


def _walk(loc: Iterable[int | str], model: type[BaseModel]) -> tuple[list[str], list[type[BaseModel]]]:
    """Follow pydantic's location to a path as the user wrote it, and the classes that may stand there.

    A location also names the alternative of a union ("grpo", "str", a class), which no user wrote: those are left out.
    """
    names: list[str] = []
    candidates = [model]
    for key in loc:
        holder = next((each for each in candidates if key in each.model_fields), None)
        if isinstance(key, int):
            names.append(str(key))
        elif holder is not None:
            names.append(key)
            candidates = models_in(holder.model_fields[key].annotation) or candidates
        else:
            candidates = [each for each in candidates if key in (each.__name__, _tag(each))] or candidates
    return names, candidates


def _tag(model: type[BaseModel]) -> str | None:
    """The value of the field by which a class is chosen among the alternatives of a section."""
    names = [name for name in ("type", "engine") if name in model.model_fields]
    return model.model_fields[names[0]].default if names else None


def _purpose(names: list[str], model: type[BaseModel]) -> str:
    """What a missing setting is for, from its docstring or its class's."""
    *outer, last = names
    field = next(each.model_fields[last] for each in _walk(outer, model)[1] if last in each.model_fields)
    docs = [field.description, *(each.__doc__ for each in models_in(field.annotation))]
    first = next((doc for doc in docs if doc), None)
    return f": {first.strip().splitlines()[0]}" if first else ""
