"""Host tensors on a device, by one copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_ALIGNMENT = 16
"""Bytes to which each tensor's start is rounded up: a multiple of every dtype's size."""


def to_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return host tensors on `device`, in order.

    On CUDA all go in one copy from pinned memory, for which the host does not wait; the results share its memory.
    Tensors that are on `device` already are returned as they are.
    """
    if device.type != "cuda":
        return [tensor.to(device) for tensor in tensors]
    moving = [index for index, tensor in enumerate(tensors) if tensor.device.type == "cpu"]
    moved = dict(zip(moving, _upload([tensors[index] for index in moving], device), strict=True))
    return [moved.get(index, tensor) for index, tensor in enumerate(tensors)]


def _upload(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    strides = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    host = torch.empty(sum(strides), dtype=torch.uint8, pin_memory=True)
    for piece, size, tensor in zip(host.split(strides), sizes, tensors, strict=True):
        _as(piece[:size], tensor).copy_(tensor)
    pieces = host.to(device, non_blocking=True).split(strides)
    return [_as(piece[:size], tensor) for piece, size, tensor in zip(pieces, sizes, tensors, strict=True)]


def _as(bytes_: Tensor, like: Tensor) -> Tensor:
    """Return bytes as a tensor of another's dtype and shape."""
    return bytes_.view(like.dtype).view(like.shape)
