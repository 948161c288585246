"""Precision and order of what a GPU computes: settings of torch that hold for the whole process.

The embedded engine and vLLM in this process compute as the trainer does; `alignlab serve` gives servers the same
precision. On a CPU a float32 product has all bits of float32, and every sum has one order.
"""

from __future__ import annotations

import logging
import os

import torch

from alignlab.config.trainer import NumericsSettings
from alignlab.errors import ConfigError
from alignlab.models.native_attention.choice import set_native_attention

_log = logging.getLogger(__name__)
WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
_FIXED_WORKSPACES = (":4096:8", ":16:8")
"""Those under which cuBLAS's products are the same in every call; the first is the faster one."""
VLLM_PRECISION = "VLLM_FLOAT32_MATMUL_PRECISION"
"""vLLM sets torch's precision when it starts, also in this process, by this variable alone."""


def apply_numerics(settings: NumericsSettings) -> None:
    """Set precision, determinism and kernels of this process as a run's config says.

    On a CPU, the log says that the first two change nothing.

    Raises:
        ConfigError: products cannot be deterministic any more: CUDA has started, or the environment says otherwise; or
            kernels that are required cannot be.
    """
    set_native_attention(settings.native_attention)
    if not torch.cuda.is_available():
        given = [name for name in ("tf32", "deterministic") if getattr(settings, name)]
        if given:
            _log.warning("%s", no_effect(given))
        return
    if settings.deterministic:
        _fix_workspace()
    torch.use_deterministic_algorithms(settings.deterministic)
    torch.backends.cudnn.deterministic = settings.deterministic
    precision = matmul_precision(settings)
    torch.set_float32_matmul_precision(precision)
    os.environ[VLLM_PRECISION] = precision


def matmul_precision(settings: NumericsSettings) -> str:
    """Return torch's name of the precision of float32 products."""
    return "high" if settings.tf32 else "highest"


def no_effect(given: list[str]) -> str:
    """Return the sentence that settings of a GPU change nothing on a CPU.

    Args:
        given: names of the settings.
    """
    return (
        f"trainer.numerics.{' and '.join(given)}: no effect on this machine, which has no GPU: a CPU has no TF32, and "
        "its sums have one order: a resumed run is the same to the bit"
    )


def _fix_workspace() -> None:
    """Give cuBLAS workspaces of fixed sizes; it reads the variable once, when CUDA starts."""
    value = os.environ.get(WORKSPACE)
    if value in _FIXED_WORKSPACES:
        return
    choices = " or ".join(_FIXED_WORKSPACES)
    if value is not None:
        raise ConfigError(
            f"the environment has {WORKSPACE}={value}, and with trainer.numerics.deterministic it must be {choices}; "
            "unset it, or set one of these"
        )
    if torch.cuda.is_initialized():
        raise ConfigError(
            f"trainer.numerics.deterministic is true, and {WORKSPACE} must be {choices} before CUDA starts, which this "
            f"process has done already, as by a model on the GPU; start with {WORKSPACE}={_FIXED_WORKSPACES[0]} in the "
            "environment"
        )
    os.environ[WORKSPACE] = _FIXED_WORKSPACES[0]
