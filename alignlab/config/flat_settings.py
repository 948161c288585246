"""The settings of a config by their dotted names, each with what a resumed run may do with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from alignlab.config.base import Frozen
from alignlab.config.messages import models_in
from alignlab.config.on_resume import OnResume

GIVEN = "given"
"""Stands for a section that need not be there and is."""


class Setting(NamedTuple):
    """The value of a setting, as JSON, and what a resumed run may do with it."""

    value: Any
    rule: OnResume


def rule_of(owner: type[Frozen], field: str) -> OnResume:
    """Return what a resumed run may do with a field: what the field says, else what its class says."""
    own = [mark for mark in owner.model_fields[field].metadata if isinstance(mark, OnResume)]
    return own[-1] if own else owner.on_resume


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
        prefix: of all names, such as "trainer".
    """
    values = config.model_dump(mode="json", fallback=lambda value: type(value).__qualname__)
    return dict(_settings(config, values, prefix))


def _settings(config: Frozen, values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Setting]]:
    for field in type(config).model_fields:
        name = f"{prefix}.{field}" if prefix else field
        held, rule = getattr(config, field), rule_of(type(config), field)
        if isinstance(held, Frozen):
            yield name, Setting(GIVEN, rule)
            yield from _settings(held, values[field], name)
        elif isinstance(held, tuple) and held and all(isinstance(part, Frozen) for part in held):
            yield name, Setting(len(held), rule)
            for number, (part, value) in enumerate(zip(held, values[field], strict=True)):
                yield from _settings(part, value, f"{name}.{number}")
        else:
            empty_sections = isinstance(held, tuple) and not held and bool(models_in(_annotation(config, field)))
            yield name, Setting(0 if empty_sections else values[field], rule)


def _annotation(config: Frozen, field: str) -> Any:
    return type(config).model_fields[field].annotation
