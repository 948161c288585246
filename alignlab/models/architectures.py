"""The fields of a new model's architecture: names checked, presets filled in."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from alignlab.errors import ConfigError
from alignlab.models.config import PolicyConfig
from alignlab.models.presets import preset_fields

_ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
_SET_ELSEWHERE = ("hub_config", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


def architecture_fields(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of `PolicyConfig` that an architecture means, without vocabulary and special tokens.

    Args:
        architecture: fields, and perhaps the `preset` whose fields they replace.

    Raises:
        ConfigError: a field or the preset is unknown, or a field comes from the tokenizer.
    """
    changes = {name: value for name, value in architecture.items() if name != "preset"}
    _check_names(changes)
    return preset_fields(architecture["preset"], **changes) if "preset" in architecture else changes


def _check_names(architecture: Mapping[str, Any]) -> None:
    fields = [name for name in PolicyConfig.__annotations__ if name not in _SET_ELSEWHERE]
    for name in architecture:
        if name in _SET_ELSEWHERE:
            raise ConfigError(f"model.architecture.{name} is set, and comes from the tokenizer; leave it out")
        if name not in fields and name not in _ROPE_KEYS:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(fields)}"
            raise ConfigError(f"model.architecture.{name} is not a field of PolicyConfig{hint}")
