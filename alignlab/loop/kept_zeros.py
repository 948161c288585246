"""Weights that are zero when a training begins, and stay so: training a pruned model keeps it pruned."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn

from alignlab.errors import ConfigError
from alignlab.models.adapters import has_adapters
from alignlab.models.routers.protocol import StartsAtZero


def keep_zeros(model: nn.Module, matrices: Iterable[nn.Parameter]) -> int:
    """Have the gradient of each weight that is zero be zero: AdamW, which starts without a momentum, never moves it.

    A resumed run begins with the same model, and so with the same zeros. Matrices that start at zero, such as the size
    of a noisy router's noise, train freely: their zeros are not pruned ones.

    Args:
        model: in training.
        matrices: its trained matrices; other weights train freely.

    Returns:
        The number of weights that are kept.

    Raises:
        ConfigError: an adapter is trained, whose merged weights would fill the zeros, or no weight is zero.
    """
    if any(map(has_adapters, model.modules())):
        raise ConfigError(
            "optim.keep_zeros is true, and must be false for an adapter, which changes every weight once merged; train "
            "all weights, without model.lora"
        )
    free = {
        module.get_parameter(name)
        for module in model.modules()
        if isinstance(module, StartsAtZero)
        for name in module.starts_at_zero
    }
    count = 0
    for parameter in matrices:
        if parameter in free:
            continue
        stays = parameter.detach() != 0
        zeros = stays.numel() - int(stays.sum())
        if zeros:
            parameter.register_hook(partial(_masked, stays))
            count += zeros
    if count == 0:
        raise ConfigError(
            "optim.keep_zeros is true, and no weight of the model is zero; make one by `alignlab prune`, or remove it"
        )
    return count


def _masked(stays: Tensor, gradient: Tensor) -> Tensor:
    return gradient * stays
