"""Weights in 16 bits that train as float32 shards: the model computes with their roundings, made as they are read.

An update is often smaller than half a unit in the last place of a weight in 16 bits, see `loop.master_weights`. A
weight that is spread over ranks is therefore held in float32; whoever reads the model's weights gets the roundings.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from alignlab.errors import ConfigError
from alignlab.models.pieces import Held, piece_of

_DTYPE = "_alignlab_rounded_to"
"""Attribute of a float32 parameter: the dtype of the weight that it holds exactly."""


def dtype_in_training(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of a model's weights, if they are in 16 bits and train; None for any other model.

    Raises:
        ConfigError: weights in 16 bits train beside others in another dtype, and cannot be gathered together.
    """
    floats = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    if not any(p.requires_grad and p.dtype.itemsize < torch.float32.itemsize for p in floats):
        return None
    dtypes = {parameter.dtype for parameter in floats}
    if len(dtypes) > 1:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise ConfigError(
            f"weights in 16 bits that train and are spread over ranks must all have one dtype, and the model "
            f"has {names}; set model.dtype: float32, or trainer.sharding.strategy: ddp"
        )
    return dtypes.pop()


@torch.no_grad()
def hold_in_float32(parameters: Iterable[nn.Parameter]) -> None:
    """Turn weights into float32, in place."""
    for parameter in parameters:
        parameter.data = parameter.data.float()


def mark_exact(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Note that float32 parameters hold weights of another dtype exactly."""
    for parameter in parameters:
        setattr(parameter, _DTYPE, dtype)


def is_exact(parameter: Tensor) -> bool:
    """Return whether a float32 parameter holds a weight of another dtype exactly."""
    return _DTYPE in parameter.__dict__


def rounded(parameter: Tensor) -> Tensor:
    """Return a weight as the model computes with it, without a gradient."""
    return parameter.detach().to(parameter.__dict__[_DTYPE]) if is_exact(parameter) else parameter.detach()


def dtype_of(parameter: Tensor) -> torch.dtype:
    """Return the dtype of a weight as the model computes with it."""
    dtype: torch.dtype = parameter.__dict__.get(_DTYPE, parameter.dtype)
    return dtype


def model_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first weight, as the model computes with it."""
    return next(dtype_of(parameter) for parameter in model.parameters() if parameter.is_floating_point())

def held_part(parameter: Tensor) -> Held:
    """Return what this rank holds of a weight, as the model computes with it."""
    weight = rounded(parameter) if is_exact(parameter) else parameter
    return piece_of(weight) or weight.detach()
