"""The choice between compiled kernels and torch for packed attention, with the reason in the log."""

from __future__ import annotations

import logging
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from alignlab.errors import ConfigError
from alignlab.models.native_attention.binding import LANES, kernels_of
from alignlab.native.build import BuildError
from alignlab.native.processor import missing_flags

logger = logging.getLogger(__name__)
Mode = Literal["auto", "off", "required"]
_mode: list[Mode] = ["auto"]


def set_native_attention(mode: Mode) -> None:
    """Choose for this process: kernels where they serve, never, or for bfloat16 on a CPU in any case.

    Raises:
        ConfigError: they are required, and cannot be.
    """
    reason = _why_not() if mode == "required" else None
    if reason is not None:
        raise ConfigError(
            f"numerics.native_attention is required, and the kernels must be possible, but {reason}; change that, or "
            "use auto"
        )
    _mode[0] = mode


def is_native(query: Tensor, value: Tensor) -> bool:
    """Return True if attention of these is computed by the kernels: bfloat16 on a CPU, heads of multiples of 16.

    Float32 keeps torch's products. Tensors of other kinds, such as those of a fake mode, have no numbers to read.
    """
    if _mode[0] == "off" or query.dtype != torch.bfloat16 or query.device.type != "cpu":
        return False
    if type(query) is not Tensor or query.shape[3] % LANES or value.shape[3] % LANES:
        return False
    return _why_not() is None


@cache
def _why_not() -> str | None:
    """Return why this machine has no kernels for bfloat16, which is logged; None if it has."""
    missing = missing_flags(torch.bfloat16)
    reason = f"the processor has no {', '.join(missing)}" if missing else None
    if reason is None:
        try:
            kernels_of(torch.bfloat16)
        except BuildError as error:
            reason = str(error)
    if reason is not None:
        logger.info("packed attention is computed by torch, not by the compiled kernels: %s", reason)
    return reason
