"""ZeRO as a `Strategy`: DeepSpeed's engine owns backward, clipping and the optimizer's step."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from alignlab.loop.empty_packs import filled_up
from alignlab.loop.ranks import Ranks
from alignlab.loop.zero.root import ZeroRoot
from alignlab.loop.zero.state import load_state, state_tensors
from alignlab.models.pieces import Held, mark_written
from alignlab.types import Experience

_NO_PACK_YET = -1
"""DeepSpeed's number of a pack before the first of an update."""


class Zero:
    """A module that one engine trains, perhaps with other roles of its model; a `Strategy`.

    Args:
        root: of the module's model.
        optimizer: of the module's parameters in training.
    """

    writes_parts = True

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, root: ZeroRoot, ranks: Ranks) -> None:
        self.module, self._optimizer, self._root, self._ranks = module, optimizer, root, ranks
        self._trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        root.join(module, optimizer)

    def begin(self) -> None:
        """Make the engine, unless there is one; every rank calls this together."""
        self._root.begin()

    def filled_up(self, packs: Sequence[Experience]) -> list[Experience]:
        """Return as many packs on every rank."""
        return filled_up(packs, self._ranks)

    @contextmanager
    def pack_context(self, *, is_last: bool) -> Iterator[None]:
        """Let gradients cross ranks for good at the end of the last pack."""
        with self._root.active(self._optimizer) as engine:
            engine.set_gradient_accumulation_boundary(is_last)
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a pack's loss."""
        # Gradients are averaged over ranks, and the loss holds the denominators of all ranks already.
        self._root.engine.backward(loss * self._ranks.count, scale_wrt_gas=False)

    def clip(self, parameters: Iterable[nn.Parameter], max_norm: float) -> float:
        """Return the norm of the step's gradients; the step scales them down to at most `max_norm`."""
        zero = self._root.optimizer
        zero.clip_grad = max_norm
        return float(self._norm(zero))

    def _norm(self, zero: Any) -> Tensor:
        """Return the norm as the engine's step computes it; infinite where a gradient is not finite."""
        if not self._root.spreads_weights:
            return cast(Tensor, zero.scaled_global_norm())
        combine = importlib.import_module("deepspeed.runtime.utils").combine_grad_norm_groups
        return cast(Tensor, combine(zero._get_norm_groups()))

    def step(self) -> None:
        """Change the weights by the gradients."""
        with self._root.active(self._optimizer) as engine:
            engine.step()
            assert engine.was_step_applied(), "gradients are finite where the learner takes a step"
        # DeepSpeed writes to weights through flat tensors, without the mark by which copies are known to be old.
        mark_written(self._trained)

    def clear(self) -> None:
        """Drop the gradients, also those of an update that is left out: the next one begins anew."""
        zero = self._root.optimizer
        zero.zero_grad()
        if not self._root.spreads_weights:  # stage 3 does the rest by itself
            zero.micro_step_id = _NO_PACK_YET
            if zero.cpu_offload:
                zero._offload_accumulated_param_ids = set()
                zero.reset_cpu_buffers()

    def state(self, trained: Mapping[str, nn.Parameter]) -> dict[str, Held]:
        """Return what this rank holds of the optimizer's state."""
        return state_tensors(self._root, trained)

    def load_state(self, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
        """Put the optimizer's state back, after the weights."""
        load_state(self._root, trained, tensors)
