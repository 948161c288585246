"""A constitution: the principles by which completions are criticised, revised and compared."""

from __future__ import annotations

from pathlib import Path

import yaml
from pydantic import Field

from alignlab.config.base import Frozen
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
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the constitution {path} must be a YAML file of a name and principles, and cannot be read: {error}"
        ) from error
    if not isinstance(said, dict):
        raise ConfigError(f"the constitution {path} must hold a name and principles, and holds {type(said).__name__}")
    return Constitution.model_validate(said)
