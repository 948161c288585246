"""Where the weights in training live, and how a backward pass, clipping and an optimizer step happen there.

The learner talks to a `Strategy` alone. Sharded weights will be another one: `loop/sharding.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn


class Strategy(Protocol):
    """Owns backward, clipping and the optimizer's step of one module in training.

    Attributes:
        module: to call for outputs with a gradient; perhaps a wrapper around the module in training.
    """

    module: nn.Module

    def pack_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return the context of one pack's forward and backward pass.

        Args:
            is_last: whether it is this rank's last pack of the step. Ranks may hold different numbers of packs.
        """
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a pack's loss, a scalar: the step's gradient is the sum over packs and ranks."""
        ...

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the step's gradients down to a norm of at most `max_norm`, and return the norm before."""
        ...

    def step(self) -> None:
        """Change the weights by the gradients."""
        ...

    def clear(self) -> None:
        """Drop the gradients."""
        ...


class SingleProcess:
    """A module that one process trains whole; a `Strategy`.

    Args:
        optimizer: of the module's parameters in training.
    """

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def pack_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context that does nothing."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a pack's loss."""
        torch.autograd.backward(loss)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients down to a norm of at most `max_norm`, and return the norm before."""
        return float(nn.utils.clip_grad_norm_(list(parameters), max_norm))

    def step(self) -> None:
        """Change the weights by the gradients."""
        self.optimizer.step()

    def clear(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)


class DataParallel(SingleProcess):
    """A module of which each rank holds all weights, with gradients averaged over ranks by DDP; a `Strategy`."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> None:
        super().__init__(accelerator.prepare(module), optimizer)
        self._accelerator = accelerator

    def pack_context(self, *, is_last: bool) -> AbstractContextManager[Any]:
        """Return a context in which gradients cross ranks in the last backward pass alone."""
        return nullcontext() if is_last else self._accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a pack's loss."""
        # DDP averages over ranks, and the loss holds the denominators of all ranks already.
        super().backward(loss * self._accelerator.num_processes)


def make_strategy(module: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator) -> Strategy:
    """Return the strategy that fits the number of ranks; a module is put on the accelerator's device by its maker."""
    if accelerator.num_processes == 1:
        return SingleProcess(module, optimizer)
    return DataParallel(module, optimizer, accelerator)
