"""FSDP2 as a `Strategy`: each rank holds some rows of each weight, of its gradient and of its optimizer state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from alignlab.loop.empty_packs import filled_up
from alignlab.loop.ranks import Ranks
from alignlab.loop.strategy import SingleProcess
from alignlab.models.pieces import held
from alignlab.models.policy import PackedModel
from alignlab.models.shards import ShardRoot, shard_root
from alignlab.types import Experience

_CLIP_EPSILON = 1e-6
"""Of `torch.nn.utils.clip_grad_norm_`."""


class FullySharded(SingleProcess):
    """A module of which each rank holds a part of each weight; a `Strategy`.

    What the module has beside its model, such as a critic's head, is small: each rank holds it whole.
    """

    writes_parts = True

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
        super().__init__(module, optimizer)
        self._ranks = ranks

    def filled_up(self, packs: Sequence[Experience]) -> list[Experience]:
        """Return as many packs on every rank."""
        return filled_up(packs, self._ranks)

    @contextmanager
    def pack_context(self, *, is_last: bool) -> Iterator[None]:
        """Sum the gradients of what each rank holds whole, at the end of the last pack."""
        yield
        for parameter in self._trained() if is_last else ():
            if not isinstance(parameter, DTensor):
                own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self._ranks.sum(own) / self._ranks.count

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a pack's loss."""
        # Gradients are averaged over ranks, and the loss holds the denominators of all ranks already.
        super().backward(loss * self._ranks.count)

    @torch.no_grad()
    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Scale the gradients of all ranks down to a norm of at most `max_norm`, and return the norm before."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        spread = [held(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        device = self._ranks.device
        squares = float(self._ranks.sum(_sum_of_squares(spread, device)) + _sum_of_squares(whole, device))
        norm = math.sqrt(squares) if squares >= 0 else math.nan
        factor = max_norm / (norm + _CLIP_EPSILON)
        for gradient in [*spread, *whole] if factor < 1 else ():
            gradient.mul_(factor)
        return norm

    def clear(self) -> None:
        """Drop the gradients, and what a pass without its backward pass has left gathered."""
        super().clear()
        root = shard_root(cast(PackedModel, self.module).model)
        assert isinstance(root, ShardRoot)
        root.release()

    def _trained(self) -> Iterator[nn.Parameter]:
        for group in self.optimizer.param_groups:
            yield from group["params"]


def _sum_of_squares(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the sum of the squares of all numbers, a scalar in float64."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.stack([tensor.float().norm().double() ** 2 for tensor in tensors]).sum()
