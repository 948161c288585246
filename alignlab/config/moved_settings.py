"""Settings that have moved: an old key is answered with the new one, in files, in overrides and in Python."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

# By the class that had the setting (and its subclasses): old key -> new key, dotted below the same section.
MOVED: Mapping[str, Mapping[str, str]] = {
    "TrainerConfig": {
        "learning_rate": "optim.learning_rate",
        "lr_schedule": "optim.schedule",
        "warmup_steps": "optim.warmup_steps",
        "weight_decay": "optim.weight_decay",
        "adam_beta1": "optim.adam_beta1",
        "adam_beta2": "optim.adam_beta2",
        "max_grad_norm": "optim.max_grad_norm",
        "on_nonfinite": "optim.on_nonfinite",
        "tokens_per_microbatch": "memory.tokens_per_microbatch",
        "logprob_chunk_tokens": "memory.logprob_chunk_tokens",
        "gradient_checkpointing": "memory.gradient_checkpointing",
        "save_every_steps": "checkpoints.every_steps",
        "keep_checkpoints": "checkpoints.keep",
    },
}


def moved_to(owner: type, key: str) -> str | None:
    """Return the new key of a setting that `owner` had, or None if `owner` never had it."""
    tables = (MOVED.get(base.__name__, {}) for base in owner.__mro__)
    return next((table[key] for table in tables if key in table), None)


def with_current_names(settings: Mapping[str, Any], current: Collection[str]) -> dict[str, Any]:
    """Return the settings of an earlier version, by dotted name, under their names of today.

    Args:
        current: the names of today; a name among them is left as it is.
    """
    new_names = {old: new for table in MOVED.values() for old, new in table.items()}
    renamed = {}
    for name, value in settings.items():
        section, dot, key = name.rpartition(".")
        new_name = f"{section}{dot}{new_names.get(key, key)}"
        renamed[new_name if name not in current and new_name in current else name] = value
    return renamed
