"""A constitution: the principles by which completions are criticised, revised and compared."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from alignlab.config.base import Frozen
from alignlab.config.input_limits import MAX_SETTINGS_BYTES, read_limited
from alignlab.config.loader import parse_yaml
from alignlab.errors import ConfigError


class Principle(Frozen):
    """One principle, as it is put to a model."""

    name: str
    prefer: str
    """The question by which two answers are compared, such as "Which answer is more honest?"."""
    rate: str
    """The question by which one answer is rated, such as "How honest is the answer?"."""
    critique: str
    """What to look for in an answer, such as "Point out where the answer is not honest."."""
    revise: str
    """What to do then, such as "Rewrite the answer so that it is honest."."""


class Constitution(Frozen):
    """What a constitution's file says."""

    name: str
    introduction: str = ""
    """Said to the judge before every question."""
    principles: tuple[Principle, ...] = Field(min_length=1)


def load_constitution(path: str | Path) -> Constitution:
    """Read a constitution from YAML.

    Raises:
        ConfigError: the file cannot be read, or says something else than `Constitution`.
    """
    try:
        text = read_limited(Path(path), MAX_SETTINGS_BYTES, ConfigError)
    except ConfigError as error:
        raise ConfigError(f"the constitution {path} must be a YAML file of a name and principles: {error}") from None
    said = parse_yaml(text, f"the constitution {path}")
    if not isinstance(said, dict):
        raise ConfigError(f"the constitution {path} must hold a name and principles, and holds {type(said).__name__}")
    try:
        return Constitution.model_validate(said)
    except ConfigError as error:
        raise ConfigError(f"the constitution {path}: {error}") from None
