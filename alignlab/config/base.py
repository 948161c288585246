"""The base of all settings: frozen, refusing what it does not know, and saying how to mend it.

Each class of settings says what a resumed run may do with its fields, and a field that differs says it for itself:

    class TrainerConfig(Frozen):
        on_resume = OnResume.REFUSED
        num_steps: Recorded[int] = Field(100, ge=1)
        output_dir: MayChange[Path] = Path("runs/alignlab")
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator
from pydantic._internal._model_construction import ModelMetaclass

from alignlab.config.error_messages import MUST, BrokenRule, explain, show, unknown_key
from alignlab.errors import ConfigError
from alignlab.files.home_folder import with_home
from alignlab.network.addresses import redacted, secret_part

T = TypeVar("T")
_MAX_ADDRESS_CHARACTERS = 2048
_NO_SECRETS = (
    "remove it: a judge's key belongs into the environment variable that judge.api_key_env names, the token of vLLM "
    "servers into ALIGNLAB_SERVER_TOKEN"
)


class OnResume(StrEnum):
    """Rule for a setting whose value is another one when the run is resumed."""

    MAY_CHANGE = "may change"
    """Nothing is said: the setting does not affect what is learnt, beyond rounding."""
    RECORDED = "recorded"
    """The run goes on; the log says so, and the run's folder and checkpoints hold both values."""
    REFUSED = "refused"
    """The run does not go on: from here on it would be another run under the same name."""


MayChange = Annotated[T, OnResume.MAY_CHANGE]
Recorded = Annotated[T, OnResume.RECORDED]
Refused = Annotated[T, OnResume.REFUSED]


class ExplainedErrors(ModelMetaclass):
    """Metaclass that turns pydantic's error of the outermost construction, nested ones included, into a ConfigError."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        """Construct and validate."""
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise ConfigError(explain(error, cls)) from None


class Frozen(BaseModel, metaclass=ExplainedErrors):
    """Immutable settings. An unknown key is an error, and every broken rule a ConfigError."""

    on_resume: ClassVar[OnResume]
    """Rule of the fields that do not say it themselves; every section of a run sets it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", protected_namespaces=(), use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    @field_validator("*")
    @classmethod
    def _check_characters(cls, value: Any) -> Any:
        """Refuse characters that neither a file name nor a UTF-8 text can have; nested sections check their own."""
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

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """Return a copy with other values of some fields, which are not validated.

        Raises:
            ConfigError: a name in `update` is no field; an old one is answered with the new one.
        """
        for name in update or {}:
            if name not in type(self).model_fields:
                raise ConfigError(unknown_key(name, [], type(self)))
        return super().model_copy(update=update, deep=deep)

    def refuse_unread(self, field: str, because: str, fix: str | None = None) -> None:
        """Raise if a field that nothing reads has another value than its default.

        Args:
            field: name of the field; dotted for one of a nested section.
            because: why nothing reads the field, completing "must stay DEFAULT ...".
            fix: what to write instead; default: remove the field.

        Raises:
            BrokenRule: the value is not the default.
        """
        *sections, name = field.split(".")
        owner: Any = self
        for section in sections:
            owner = getattr(owner, section)
        value, default = getattr(owner, name), type(owner).model_fields[name].default
        if value != default:
            usual = default if isinstance(default, str) else show(default)
            raise BrokenRule(field, value, f"stay {usual} {because}", fix or f"remove {name}")


def check_address(
    field: str, url: str, *, must: str, schemes: tuple[str, ...], port: bool = False, path: bool = True
) -> None:
    """Raise if a setting is no address, or an address with a secret, which the run's files would hold.

    Args:
        field: name of the setting.
        must: requirement, completing "and must ...".
        schemes: allowed schemes.
        port, path: whether the address must name a port, and may have a path.

    Raises:
        BrokenRule: with a message that shows no secret.
    """
    shown = redacted(url)
    if not (_is_plain(url) and _is_address(url, schemes, port=port, path=path)):
        raise BrokenRule(field, shown, must, f"correct {shown:.80}")
    secret = secret_part(url)
    if secret is not None:
        raise BrokenRule(field, shown, f"have no {secret}, which files and messages would show", _NO_SECRETS)


def _is_plain(url: str) -> bool:
    return url.isascii() and url.isprintable() and " " not in url and len(url) <= _MAX_ADDRESS_CHARACTERS


def _is_address(url: str, schemes: tuple[str, ...], *, port: bool, path: bool) -> bool:
    try:
        parts = urlsplit(url)
        has_place = parts.scheme in schemes and bool(parts.hostname) and bool(parts.port or not port)
    except ValueError:  # a bracket without its partner, or a port that is no number
        return False
    return has_place and (path or parts.path in ("", "/"))


def at_home(path: Any) -> Any:
    """Return a path with the user's home folder in place of a leading `~`; anything else unchanged."""
    return str(with_home(path)) if isinstance(path, str) and path.startswith("~") else path


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts and paths in a value, its lists and mappings included."""
    visited: set[int] = set()  # a value may hold itself
    pending = [value]
    while pending:
        entry = pending.pop()
        if isinstance(entry, str | Path):
            yield str(entry)
        elif isinstance(entry, Mapping | list | tuple) and id(entry) not in visited:
            visited.add(id(entry))
            entries: Iterable[Any] = (*entry, *entry.values()) if isinstance(entry, Mapping) else entry
            pending.extend(entries)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
