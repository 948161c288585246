"""The base of every configuration class: frozen, refusing what it does not know, and saying how to mend it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic._internal._model_construction import ModelMetaclass

from alignlab.config.messages import MUST, explain, show
from alignlab.config.on_resume import OnResume
from alignlab.errors import ConfigError


class ExplainedErrors(ModelMetaclass):
    """Turns pydantic's error of the outermost construction, which holds all nested ones, into a ConfigError."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Construct and validate."""
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None


class Frozen(BaseModel, metaclass=ExplainedErrors):
    """Immutable; an unknown key is an error. Every broken rule is a ConfigError."""

    on_resume: ClassVar[OnResume]
    """What a resumed run may do with the fields that do not say it themselves; each section of a run says it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _check_characters(cls, value: Any) -> Any:
        """Refuse characters that no file's name and no text in UTF-8 can have, in whatever a setting holds.

        Sections in it check their own.
        """
        for text in _texts(value):
            if "\0" in text or not _is_utf8(text):
                kind = "zero characters" if "\0" in text else "halves of surrogate pairs"
                raise ValueError(f"{show(text)} has {kind}{MUST}have none; take them out")
        return value

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """Construct from a dict, such as a parsed YAML file."""
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None


def _texts(value: Any) -> Iterator[str]:
    """Texts and paths in a value, with those in its lists and mappings."""
    seen: set[int] = set()
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, str | Path):
            yield str(each)
        elif isinstance(each, Mapping | list | tuple) and id(each) not in seen:
            seen.add(id(each))
            held: Iterable[Any] = (*each, *each.values()) if isinstance(each, Mapping) else each
            left.extend(held)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
