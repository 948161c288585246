"""The base of every configuration class: frozen, refusing what it does not know, and saying how to mend it."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic._internal._model_construction import ModelMetaclass

from alignlab.config.messages import explain
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

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """Construct from a dict, such as a parsed YAML file."""
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None
