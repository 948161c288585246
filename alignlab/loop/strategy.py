"""Where the weights in training live, and how a backward pass, clipping and an optimizer step happen there.

The learner talks to a `Strategy` alone. Weights that are spread over ranks have another one: `loop/sharding.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from alignlab.loop.ranks import Ranks
from alignlab.models.pieces import Held, piece_of
from alignlab.runs.checkpoint import load_optimizer_tensors, optimizer_tensors
from alignlab.types import Experience


class Strategy(Protocol):
    """Owns backward, clipping and the optimizer's step of one module in training.

    Attributes:
        module: to call for outputs with a gradient; perhaps a wrapper around the module in training.
        writes_parts: whether each rank holds a part of the weights or of the optimizer's state alone, and writes it.
    """

    module: nn.Module
    writes_parts: bool

    def begin(self) -> None:
        """Make what the ranks make together; afterwards `load_state` and `state` wait for no other rank."""
        ...

    def filled_up(self, packs: Sequence[Experience]) -> Sequence[Experience]:
        """Return the packs that this rank has to put through the module, for a step or for scores, in their order;
        perhaps with empty ones after them."""
        ...

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

    def state(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Held]:
        """Return what this rank holds of the optimizer's state, by the names of `runs.checkpoint`.

        Args:
            trained: the parameters in training, by name.
        """
        ...

    def load_state(self, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        """Put the optimizer's state back, and take over the weights as they are now.

        Raises:
            CheckpointError: an entry belongs to no parameter, or has another shape than its parameter.
        """
        ...


class SingleProcess:
    """A module that one process trains whole; a `Strategy`.

    Args:
        optimizer: of the module's parameters in training.
    """

    writes_parts = False

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.optimizer = module, optimizer

    def begin(self) -> None:
        """Make nothing: all there is was made before."""

    def filled_up(self, packs: Sequence[Experience]) -> Sequence[Experience]:
        """Return the packs."""
        return packs

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

    def state(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Held]:
        """Return the optimizer's state."""
        return {name: piece_of(tensor) or tensor for name, tensor in optimizer_tensors(self.optimizer, trained).items()}

    def load_state(self, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        """Put the optimizer's state back."""
        load_optimizer_tensors(self.optimizer, trained, tensors)


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


class GradientSum(SingleProcess):
    """A module of which each rank holds all weights, some in 16 bits, with float32 gradients summed over ranks; a
    `Strategy`. DDP would exchange them in the weights' dtype."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        super().__init__(module, optimizer)
        self._ranks = ranks

    @contextmanager
    def pack_context(self, *, is_last: bool) -> Iterator[None]:
        """Sum the gradients over ranks at the end of the last pack."""
        yield
        for parameter in self._trained() if is_last else ():
            # A weight that none of a rank's packs has used, such as an expert's, has no gradient there.
            own = torch.zeros_like(parameter, dtype=torch.float32) if parameter.grad is None else parameter.grad
            parameter.grad = self._ranks.sum(own)

    def _trained(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            yield from group["params"]
