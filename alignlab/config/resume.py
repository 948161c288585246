"""Settings by dotted name with their resume rules, and the manual's table of these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

from alignlab.config.base import Frozen, OnResume
from alignlab.config.error_messages import models_in
from alignlab.config.run import RunConfig

GIVEN = "given"
"""Value of an optional section that is there."""
_COLUMNS = (OnResume.MAY_CHANGE, OnResume.RECORDED, OnResume.REFUSED)


class Setting(NamedTuple):
    """A setting's value, as JSON, and its resume rule."""

    value: Any
    rule: OnResume


def rule_of(owner: type[Frozen], field: str) -> OnResume:
    """Return the resume rule of a field: the field's mark, else its class's."""
    marks = [mark for mark in owner.model_fields[field].metadata if isinstance(mark, OnResume)]
    return marks[-1] if marks else owner.on_resume


def refused_settings(config: Frozen) -> dict[str, Any]:
    """Return the settings that a resumed run may not change, by dotted name.

    A stage's training (`trainer`) is left out: it is a run of its own.
    """
    settings = flat_settings(config).items()
    return {
        name: setting.value
        for name, setting in settings
        if setting.rule is OnResume.REFUSED and name.partition(".")[0] != "trainer"
    }


def flat_settings(config: Frozen, prefix: str = "") -> dict[str, Setting]:
    """Return all settings of a config by dotted name; `rewards.0.weight` is one of a list of sections.

    A section that may be left out is a setting too, "given" or None; so is a list of sections, with its length.

    Args:
        prefix: prefix of all names, such as "trainer".
    """
    values = config.model_dump(mode="json", fallback=lambda value: type(value).__qualname__)
    return dict(_settings(config, values, prefix))


def _settings(config: Frozen, values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Setting]]:
    for field in type(config).model_fields:
        name = f"{prefix}.{field}" if prefix else field
        content, rule = getattr(config, field), rule_of(type(config), field)
        if isinstance(content, Frozen):
            yield name, Setting(GIVEN, rule)
            yield from _settings(content, values[field], name)
        elif isinstance(content, tuple) and _holds_sections(config, field):
            yield name, Setting(len(content), rule)
            for number, (part, value) in enumerate(zip(content, values[field], strict=True)):
                yield from _settings(part, value, f"{name}.{number}")
        else:
            yield name, Setting(values[field], rule)


def _holds_sections(config: Frozen, field: str) -> bool:
    """Return whether a field is a list of sections, by its annotation."""
    return bool(models_in(type(config).model_fields[field].annotation))


def sections() -> dict[type[Frozen], list[str]]:
    """Return every class of settings of a run, with the dotted names under which it stands, outermost first."""
    places: dict[type[Frozen], list[str]] = {}
    for owner, name in _walk(RunConfig, ""):
        for kind in reversed([base for base in owner.__mro__ if issubclass(base, Frozen) and base is not Frozen]):
            names = places.setdefault(kind, [])
            if name not in names:
                names.append(name)
    return places


def resume_table() -> str:
    """Return the table in Markdown: a row for each class, with the fields that it adds or gives another rule.

    Of the sections, only optional ones are listed: the presence of such a section is a setting too.
    """
    lines = [f"| settings | {' | '.join(_COLUMNS)} |", "|---|---|---|---|"]
    for owner, places in sections().items():
        fields = [name for name in owner.__annotations__ if name in owner.model_fields and _is_listed(owner, name)]
        by_rule = {rule: [f"`{name}`" for name in fields if rule_of(owner, name) is rule] for rule in _COLUMNS}
        if fields:
            kind = owner.__name__
            named = f"every {kind[1:]}" if kind.startswith("_") else kind
            cells = " | ".join(", ".join(by_rule[rule]) for rule in _COLUMNS)
            place = f"`{places[0]}`" if places[0] else "the file itself"
            lines.append(f"| {place} ({named}) | {cells} |")
    return "\n".join(lines) + "\n"


def _is_listed(owner: type[Frozen], field: str) -> bool:
    """Return whether a class adds a field, or gives it another rule than its bases."""
    annotation = owner.model_fields[field].annotation
    may_be_absent = type(None) in get_args(annotation)
    if models_in(annotation) and not may_be_absent:
        return False
    bases = (base for base in owner.__mro__[1:] if issubclass(base, Frozen) and field in base.model_fields)
    base = next(bases, None)
    return base is None or rule_of(base, field) is not rule_of(owner, field)


def _walk(owner: type[Frozen], name: str) -> Iterator[tuple[type[Frozen], str]]:
    yield owner, name
    for field, info in owner.model_fields.items():
        for inner in models_in(info.annotation):
            assert issubclass(inner, Frozen)
            yield from _walk(inner, f"{name}.{field}" if name else field)
