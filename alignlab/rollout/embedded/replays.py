"""Decoding steps of few shapes, recorded once as CUDA graphs and replayed.

A decoding step launches some thirty kernels a layer, which may take the host longer than the GPU needs to compute
them. A graph launches them all at once. It reads its inputs, the weights and the cache at the addresses that they had
when it was recorded. So inputs are copied to buffers of its own; and all graphs are dropped when the weights, or the
copies that the engine runs on, lie elsewhere than at the last call (after an update with a merged adapter; a policy
that is trained in place keeps its addresses), and when the cache is allocated anew: when it grows, and after a `rest`
that freed it. A large cache must give way while the policy learns, and its steps are recorded again in each rollout,
after which each is replayed hundreds of times; a small one stays where it lies, with its records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignlab.errors import RolloutError

RECORDED_AT = 4
"""Steps of one shape until it is recorded: the first compile kernels, and a recording costs as much as some steps."""

Step = Callable[[Sequence[Tensor]], Tensor]
Shapes = tuple[tuple[torch.Size, torch.dtype], ...]


class CUDAGraph:
    """Work that was recorded on the GPU's own stream of launches; a call replays it.

    Args:
        work: launches kernels on tensors that stay where they are, without waiting for the device, and returns one.
        pool: memory that graphs share which never run at once.

    Raises:
        RolloutError: the work cannot be recorded.
    """

    def __init__(self, work: Callable[[], Tensor], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile: rewards, uploads.
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._output = work()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RolloutError(
                f"a decoding step could not be recorded as a CUDA graph ({error}); set rollout.cuda_graphs to false"
            ) from error

    def __call__(self) -> Tensor:
        self._graph.replay()
        return self._output


def record(work: Callable[[], Tensor], pool: Any) -> Callable[[], Tensor]:
    """Return a function that repeats `work` on what its tensors hold then; see `CUDAGraph`."""
    return CUDAGraph(work, pool)


def new_pool() -> Any:
    """Return memory for graphs to share."""
    return torch.cuda.graph_pool_handle()


@dataclass
class _Shape:
    """A shape of steps: how often it came, its buffers, and the replay of its record."""

    times: int = 0
    buffers: list[Tensor] = field(default_factory=list)
    replay: Callable[[], Tensor] | None = None


class Replays:
    """Runs steps; those whose shape comes again and again are recorded and replayed.

    Args:
        step: computes a step from its tensors alone, besides weights and cache.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._shapes: dict[Shapes, _Shape] = {}
        self._pool: Any = None
        self._addresses: tuple[int, ...] = ()

    def keep_if_at(self, addresses: tuple[int, ...]) -> None:
        """Drop all records, unless the weights' addresses are those of the last call."""
        if addresses != self._addresses:
            self.drop()
            self._addresses = addresses

    def drop(self) -> None:
        """Forget all records, and free their memory."""
        self._shapes, self._pool = {}, None

    def run(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the step's result on these tensors; it is overwritten by the next call."""
        shape = self._shapes.setdefault(tuple((tensor.shape, tensor.dtype) for tensor in tensors), _Shape())
        shape.times += 1
        if shape.times < RECORDED_AT:
            return self._step(tensors)
        if shape.replay is None:
            self._pool = new_pool() if self._pool is None else self._pool
            shape.buffers = buffers = [tensor.clone() for tensor in tensors]
            shape.replay = record(lambda: self._step(buffers), self._pool)
        else:
            _copy_all(shape.buffers, tensors)
        return shape.replay()


def _copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy tensors, all those of one dtype by one kernel."""
    for dtype in dict.fromkeys(tensor.dtype for tensor in targets):
        chosen = [index for index, tensor in enumerate(targets) if tensor.dtype == dtype]
        torch._foreach_copy_([targets[i] for i in chosen], [sources[i] for i in chosen])
