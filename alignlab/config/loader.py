"""A run from a YAML file and `key=value` overrides, and back to YAML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alignlab.config.error_messages import LONGEST_SHOWN, show
from alignlab.config.run import RunConfig
from alignlab.errors import ConfigError
from alignlab.files.input_files import MAX_DEPTH, MAX_SETTINGS_BYTES, parse_yaml, read_limited
from alignlab.files.library_errors import reading


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the run that a file describes, with settings replaced by overrides.

    Args:
        path: a YAML file.
        overrides: such as "trainer.num_steps=10" or "rewards.0.weight=2"; values are YAML.

    Raises:
        ConfigError: the file cannot be read, or a setting or an override breaks a rule; it names which.
    """
    settings = read_settings(path)
    for override in overrides:
        apply_override(settings, override)
    try:
        return RunConfig.model_validate(settings)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def read_settings(path: str | Path) -> dict[str, Any]:
    """Return the mapping in a YAML file, before its settings are checked.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping.
        DiskError: it cannot be looked for, such as a name that is too long.
    """
    path = Path(path)
    with reading(path, "the config", ConfigError):
        is_file = path.is_file()
    if not is_file:
        configs = sorted(map(str, path.parent.glob("*.yaml"))) if path.parent.is_dir() else []
        hint = f"use one of {', '.join(configs)}" if configs else "correct the path"
        raise ConfigError(f"{path} must be a YAML file, and does not exist; {hint}")
    text = read_limited(path, MAX_SETTINGS_BYTES, ConfigError)
    settings = parse_yaml(text, str(path))
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must be a mapping of settings, and is {show(settings)}; see configs/")
    return settings


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one value in nested settings, in place; missing mappings on the way are created.

    Raises:
        ConfigError: it is not `key=value`, or its path goes through a value or past a list's end.
    """
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"an override must be key=value, and is {override!r}; write for example trainer.num_steps=10")
    if len(keys) > MAX_DEPTH:
        raise ConfigError(f"an override must name a setting at most {MAX_DEPTH} levels down, and is {show(override)}")
    value = parse_yaml(text, f"override {path if len(path) <= LONGEST_SHOWN else show(path)}")
    section: Any = settings
    for depth, key in enumerate(keys[:-1]):
        if isinstance(section, dict) and section.get(key) is None:
            section[key] = {}
        section = section[_index_in(section, key, keys[:depth], override)]
    section[_index_in(section, keys[-1], keys[:-1], override)] = value


def _index_in(section: Any, key: str, outer: Sequence[str], override: str) -> str | int:
    """Return the index of `key` in `section`: the key in a mapping, a number in a list."""
    path = ".".join(outer)
    if isinstance(section, dict):
        return key
    if not isinstance(section, list):
        raise ConfigError(f"override {override}: {path} is {show(section)}, and has no entries; set it whole")
    if not key.isdecimal() or int(key) >= len(section):
        fix = f"it has {path}.0 to {path}.{len(section) - 1}" if section else f"it is empty; set {path} whole"
        raise ConfigError(f"override {override}: {path} has no entry {key}; {fix}")
    return int(key)


def dump_resolved(config: RunConfig) -> str:
    """Return YAML with every setting of `config`, given or default; loaded again, it gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
