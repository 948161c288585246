"""A run from a YAML file and `key=value` overrides, and back to YAML."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignlab.config.input_limits import (
    MAX_DEPTH,
    MAX_SETTINGS_BYTES,
    LimitedLoader,
    load_limited,
    read_limited,
)
from alignlab.config.messages import LONGEST_SHOWN, show
from alignlab.config.run import RunConfig
from alignlab.errors import ConfigError
from alignlab.library_errors import reading


class _Loader(LimitedLoader):
    """Plain YAML, except that 1e-6 is a number (YAML 1.1 wants 1.0e-6) and that a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A dict; refuses a second value for a key."""
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                mark = key_node.start_mark
                raise yaml.constructor.ConstructorError(problem=f"{key} is given twice", problem_mark=mark)
            seen |= {key} if isinstance(key, Hashable) else set()
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run that a file describes, with settings replaced by overrides.

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
    """The mapping in a YAML file, before it is checked.

    Raises:
        ConfigError: there is no such file, or it is not a YAML mapping.
        DiskError: it cannot be looked for, such as a name that is too long.
    """
    path = Path(path)
    with reading(path, "the config", ConfigError):
        is_file = path.is_file()
    if not is_file:
        there = sorted(str(each) for each in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f"use one of {', '.join(there)}" if there else "correct the path"
        raise ConfigError(f"{path} must be a YAML file, and does not exist; {hint}")
    text = read_limited(path, MAX_SETTINGS_BYTES, ConfigError)
    settings = parse_yaml(text, str(path))
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must be a mapping of settings, and is {show(settings)}; see configs/")
    return settings


def parse_yaml(text: str, source: str) -> Any:
    """YAML as this project reads it.

    Raises:
        ConfigError: it is not YAML, gives a key twice, or is beyond `input_limits`; with the line.
    """
    return load_limited(text, source, _Loader)


def apply_override(settings: dict[str, Any], override: str) -> None:
    """Set one value in nested settings, in place; missing mappings on the way are made.

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
    holder: Any = settings
    for depth, key in enumerate(keys[:-1]):
        if isinstance(holder, dict) and holder.get(key) is None:
            holder[key] = {}
        holder = holder[_place(holder, key, keys[:depth], override)]
    holder[_place(holder, keys[-1], keys[:-1], override)] = value


def _place(holder: Any, key: str, outer: Sequence[str], override: str) -> str | int:
    """Where `key` is in `holder`: itself in a mapping, a number in a list."""
    where = ".".join(outer)
    if isinstance(holder, dict):
        return key
    if not isinstance(holder, list):
        raise ConfigError(f"override {override}: {where} is {show(holder)}, and has no entries; set it whole")
    if not key.isdecimal() or int(key) >= len(holder):
        fix = f"it has {where}.0 to {where}.{len(holder) - 1}" if holder else f"it is empty; set {where} whole"
        raise ConfigError(f"override {override}: {where} has no entry {key}; {fix}")
    return int(key)


def dump_resolved(config: RunConfig) -> str:
    """YAML with every setting of `config`, given or default, that loads back to an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)
