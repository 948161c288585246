"""Tensors in buffers of a bounded size, the way they are broadcast: both sides lay the buffers out alike.

Tensors keep their order. Small ones share a buffer, each at a multiple of 16 bytes; one that is larger than a buffer
travels alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from alignlab.errors import RolloutError
from alignlab.rollout.vllm.weight_group import WeightGroup

BUFFER_BYTES = 64 * 2**20
"""Size of a trainer's buffers; it tells it to the servers."""
_ALIGNMENT = 16
_MAX_NAME, _MAX_DIMENSIONS = 512, 16
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool,
    )
}  # fmt: skip


@dataclass(frozen=True)
class TensorShape:
    """A tensor without its numbers."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor, bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Buffer:
    """Tensors that travel together.

    Attributes:
        tensors: (first byte, tensor), in order.
        size: bytes.
    """

    tensors: tuple[tuple[int, TensorShape], ...]
    size: int


def shapes_of(tensors: Mapping[str, Tensor]) -> list[TensorShape]:
    """Return the shapes of tensors, which may be on the device "meta", in order."""
    return [TensorShape(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def shapes_to_json(shapes: Iterable[TensorShape]) -> list[list[Any]]:
    """Return [name, dtype, shape] of each tensor."""
    return [[shape.name, str(shape.dtype).removeprefix("torch."), list(shape.shape)] for shape in shapes]


def shapes_from_json(rows: Any) -> list[TensorShape]:
    """Return the tensors of `shapes_to_json`.

    Raises:
        ValueError: the rows are not of that form, or a name comes twice.
    """
    if not isinstance(rows, list):
        raise ValueError("the tensors must be a list")
    shapes = [_shape_from_json(row) for row in rows]
    if len({shape.name for shape in shapes}) < len(shapes):
        raise ValueError("each tensor must be named once")
    return shapes


def _shape_from_json(row: Any) -> TensorShape:
    if not isinstance(row, list) or len(row) != 3:
        raise ValueError("a tensor must be [name, dtype, shape]")
    name, dtype, shape = row
    if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
        raise ValueError(f"a tensor's name must have 1 to {_MAX_NAME} characters")
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"a tensor's dtype must be one of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"a tensor's shape must be a list of at most {_MAX_DIMENSIONS} numbers")
    if not all(type(length) is int and 0 <= length < 2**40 for length in shape):
        raise ValueError("a tensor's lengths must be whole numbers from 0")
    return TensorShape(name, _DTYPES[dtype], tuple(shape))


def buffers(shapes: Iterable[TensorShape], max_bytes: int) -> Iterator[Buffer]:
    """Yield the buffers that tensors travel in, each of at most `max_bytes` unless it holds a single tensor."""
    tensors: list[tuple[int, TensorShape]] = []
    size = 0
    for shape in shapes:
        start = size + -size % _ALIGNMENT
        if tensors and start + shape.num_bytes > max_bytes:
            yield Buffer(tuple(tensors), size)
            tensors, start = [], 0
        tensors.append((start, shape))
        size = start + shape.num_bytes
    if tensors:
        yield Buffer(tuple(tensors), size)


def send(
    tensors: Iterable[tuple[str, Tensor]], shapes: Sequence[TensorShape], group: WeightGroup, *, buffer_bytes: int
) -> None:
    """Broadcast tensors from rank 0, as they are read; no more than one buffer of them is held.

    Args:
        tensors: (name, tensor), as `shapes` describe them.
        shapes: what the other processes have been told.
        buffer_bytes: limit of a buffer that several tensors share; the other processes have been told it too.

    Raises:
        RolloutError: a tensor is another than was told.
        BroadcastBroken: another process died or took too long.
    """
    stream = iter(tensors)
    for buffer in buffers(shapes, buffer_bytes):
        data = _filled(buffer, stream, group.device)
        if data.numel():
            group.broadcast(data)
    extra = next(stream, None)
    if extra is not None:
        raise RolloutError(f"tensor {extra[0]} is to be broadcast, and was not announced")


def receive(
    shapes: Iterable[TensorShape], group: WeightGroup, *, buffer_bytes: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) that rank 0 sends. The tensors of a buffer share memory, which is never written again.

    Args:
        shapes: what rank 0 has announced.
        buffer_bytes: limit of its buffers.

    Raises:
        BroadcastBroken: another process died or took too long.
    """
    for buffer in buffers(shapes, buffer_bytes):
        data = torch.empty(buffer.size, dtype=torch.uint8, device=group.device)
        if data.numel():
            group.broadcast(data)
        for start, shape in buffer.tensors:
            yield shape.name, _part(data, start, shape)


def _filled(buffer: Buffer, stream: Iterator[tuple[str, Tensor]], device: torch.device) -> Tensor:
    """Return the bytes of a buffer, with the next tensors of the stream."""
    if len(buffer.tensors) == 1:
        return _next(stream, buffer.tensors[0][1]).to(device).contiguous().view(-1).view(torch.uint8)
    data = torch.zeros(buffer.size, dtype=torch.uint8, device=device)
    for start, shape in buffer.tensors:
        _part(data, start, shape).copy_(_next(stream, shape))
    return data


def _next(stream: Iterator[tuple[str, Tensor]], expected: TensorShape) -> Tensor:
    name, tensor = next(stream, ("nothing", torch.empty(0)))
    if (name, tensor.dtype, tuple(tensor.shape)) != (expected.name, expected.dtype, expected.shape):
        raise RolloutError(
            f"the next tensor to broadcast is {name} ({tensor.dtype}, {tuple(tensor.shape)}), and {expected.name} "
            f"({expected.dtype}, {expected.shape}) was announced"
        )
    return tensor.detach()


def _part(data: Tensor, start: int, shape: TensorShape) -> Tensor:
    """Return the tensor in the bytes of a buffer; it shares their memory."""
    return data[start : start + shape.num_bytes].view(shape.dtype).view(shape.shape)
