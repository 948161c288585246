"""The manual's table of what a resumed run may change, from the settings' own declarations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from alignlab.config.base import Frozen
from alignlab.config.flat_settings import rule_of
from alignlab.config.messages import models_in
from alignlab.config.on_resume import OnResume
from alignlab.config.run import RunConfig

_COLUMNS = (OnResume.MAY_CHANGE, OnResume.RECORDED, OnResume.REFUSED)


def sections() -> dict[type[Frozen], list[str]]:
    """Return every class of settings of a run, with the dotted names under which it stands, outermost first."""
    places: dict[type[Frozen], list[str]] = {}
    for owner, name in _walk(RunConfig, ""):
        for kind in reversed([each for each in owner.__mro__ if issubclass(each, Frozen) and each is not Frozen]):
            names = places.setdefault(kind, [])
            if name not in names:
                names.append(name)
    return places


def resume_table() -> str:
    """Return the table in Markdown: a row for each class, of the fields that it adds or of which it says another thing.

    A section is in it only where it may be left out: whether it is there is then a setting too.
    """
    lines = [f"| settings | {' | '.join(_COLUMNS)} |", "|---|---|---|---|"]
    for owner, places in sections().items():
        own = [name for name in owner.__annotations__ if name in owner.model_fields and _is_told(owner, name)]
        by_rule = {rule: [f"`{name}`" for name in own if rule_of(owner, name) is rule] for rule in _COLUMNS}
        if own:
            kind = owner.__name__
            named = f"every {kind[1:]}" if kind.startswith("_") else kind
            cells = " | ".join(", ".join(by_rule[rule]) for rule in _COLUMNS)
            where = f"`{places[0]}`" if places[0] else "the file itself"
            lines.append(f"| {where} ({named}) | {cells} |")
    return "\n".join(lines) + "\n"


def _is_told(owner: type[Frozen], field: str) -> bool:
    """Whether a class says something of a field that its bases do not."""
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
