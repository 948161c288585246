"""Whether DeepSpeed can be used here."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import warnings
from types import ModuleType

from packaging.version import Version

from alignlab.errors import ConfigError

TESTED = ("0.19.8", "0.20")
"""Versions from the first up to before the second. What is read of an engine's state has no public name."""
_SHARED_MEMORY_OPERATOR = "deepspeed_shm_comm"


def check_deepspeed() -> None:
    """Raise if DeepSpeed is missing, or of a version that was not tested.

    Raises:
        ConfigError: with the command that installs it.
    """
    try:
        found = importlib.metadata.version("deepspeed")
    except importlib.metadata.PackageNotFoundError:
        found = None
    if found is None or not Version(TESTED[0]) <= Version(found) < Version(TESTED[1]):
        is_there = "is not installed" if found is None else f"is {found}"
        raise ConfigError(
            f"trainer.sharding.strategy zero1, zero2 and zero3 need deepspeed >= {TESTED[0]}, < {TESTED[1]}, which "
            f"{is_there}; install it by: bash launch/setup_env.sh deepspeed, or set the strategy to fsdp2 or ddp"
        )


def load_deepspeed(device_type: str) -> ModuleType:
    """Import DeepSpeed, quietly, and return it.

    Args:
        device_type: of the tensors, such as cpu.

    Raises:
        ConfigError: see `check_deepspeed`.
    """
    check_deepspeed()
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    # It calls collectives by names that this torch is about to drop, and each call would say so.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # the import sets it
    if device_type == "cpu":  # an operator for ranks of one machine that a compiler would have to make first
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OPERATOR] = False
    return deepspeed
