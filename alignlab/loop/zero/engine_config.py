"""DeepSpeed's settings for a run: those that follow from the trainer's config, and a user's own beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from alignlab.config.trainer import ShardingSettings
from alignlab.errors import ConfigError
from alignlab.files.input_files import read_json_object

AUTO = "auto"
"""In a user's file: what follows from the config."""
_LEAST_BUCKET = 2**20
_DECIDED = {
    "gradient_clipping": "trainer.optim.max_grad_norm",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
    "zero_optimization.stage": "trainer.sharding.strategy",
    "zero_optimization.offload_optimizer.device": "trainer.sharding.offload",
    "zero_optimization.offload_param.device": "trainer.sharding.offload",
    "train_batch_size": "the trainer's own settings",
    "train_micro_batch_size_per_gpu": "trainer.memory.tokens_per_microbatch",
    "gradient_accumulation_steps": "trainer.memory.tokens_per_microbatch",
    "zero_allow_untested_optimizer": "trainer.optim",
    "zero_force_ds_cpu_optimizer": "trainer.optim",
}
"""What decides a setting here, by its path in DeepSpeed's file. A user's file may repeat the value."""
_ELSEWHERE = {
    "optimizer": "trainer.optim makes AdamW",
    "scheduler": "trainer.optim.schedule sets the learning rate",
    "amp": "model.dtype sets the dtype",
    "torch_autocast": "model.dtype sets the dtype",
    "compression_training": "weights are trained as they are",
    "data_efficiency": "the trainer chooses the data",
    "curriculum_learning": "the trainer chooses the data",
}
"""Sections of DeepSpeed's file whose work is done elsewhere."""


def engine_config(settings: ShardingSettings, *, max_grad_norm: float, largest: int) -> dict[str, Any]:
    """Return the settings of an engine.

    Args:
        settings: with a ZeRO strategy.
        max_grad_norm: of the trainer's optimizer.
        largest: elements of the largest trained tensor. A bucket holds one such tensor: DeepSpeed's own, of half a
            billion elements, are larger than many a model.

    Raises:
        ConfigError: a user's file cannot be read, or contradicts the trainer's config.
    """
    run_settings = _run_settings(settings, max_grad_norm, max(largest, _LEAST_BUCKET))
    if settings.deepspeed is None:
        return run_settings
    user_settings = _user_settings(settings.deepspeed)
    _check(run_settings, user_settings, settings.deepspeed)
    return _within(run_settings, user_settings)


def _user_settings(path: Path) -> dict[str, Any]:
    """Return what a user's DeepSpeed file says.

    Raises:
        ConfigError: the file is missing, no JSON object, or has a section whose work is done elsewhere.
    """
    user_settings = read_json_object(path, ConfigError)
    for section, instead in _ELSEWHERE.items():
        if user_settings.get(section):
            raise ConfigError(f"{path} has {section}, and {instead}; remove it there")
    return user_settings


def _run_settings(settings: ShardingSettings, max_grad_norm: float, bucket: int) -> dict[str, Any]:
    zero: dict[str, Any] = {
        "stage": settings.zero_stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket,
        "offload_optimizer": {"device": "none" if settings.offload == "none" else "cpu"},
    }
    if settings.zero_stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket, "stage3_max_live_parameters": 2 * bucket,
            "stage3_max_reuse_distance": 2 * bucket, "stage3_param_persistence_threshold": 0,
            "offload_param": {"device": "cpu" if settings.offload == "all" else "none"},
        }
    return {
        "train_micro_batch_size_per_gpu": 1,  # a pack; there is no data loader of DeepSpeed's
        "gradient_accumulation_steps": 1,  # the learner says which pack is the last
        "gradient_clipping": max_grad_norm, "bf16": {"enabled": False}, "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero, "steps_per_print": 10**9,
    }  # fmt: skip


def _check(run_settings: Mapping[str, Any], user_settings: Mapping[str, Any], path: Path) -> None:
    """Raise if a user's settings contradict run_settings.

    Raises:
        ConfigError: with the setting, both values, and what decides it here.
    """
    decided = dict(_flat(run_settings))
    for name, value in _flat(user_settings):
        if name in _DECIDED and value not in (AUTO, decided.get(name, AUTO)):
            here = f"makes it {json.dumps(decided[name])}" if name in decided else "decides it"
            raise ConfigError(
                f'{path} has {name}: {json.dumps(value)}, and {_DECIDED[name]} {here}; write "{AUTO}" there, or remove '
                "it"
            )


def _within(run_settings: Mapping[str, Any], user_settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a user's settings within run_settings."""
    made = dict(run_settings)
    for name, value in user_settings.items():
        if isinstance(value, dict):
            made[name] = _within(made.get(name) or {}, value)
        elif value != AUTO:
            made[name] = value
    return made


def _flat(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each setting by its path, such as zero_optimization.stage."""
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
