"""Structures that a kernel reads: numbers, and addresses of tensors that were checked and are held."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def address(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> int:
    """Return the address of a tensor, after checking that it is what a kernel reads: a wrong one would be a crash.

    Args:
        shape: that it must have; -1 allows any size.

    Raises:
        ValueError: its shape, dtype, device or layout is another.
    """
    fits = tensor.dim() == len(shape) and all(n in (-1, m) for n, m in zip(shape, tensor.shape, strict=True))
    if not fits or tensor.dtype != dtype or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"a native kernel reads {dtype} of shape {tuple(shape)}, contiguous on the CPU, and was given "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        )
    return tensor.data_ptr()


class Held(ctypes.Structure):
    """A structure that keeps the tensors whose addresses it has."""

    def hold(self, **values: Any) -> None:
        """Set fields; a triple (tensor, shape, dtype) is checked, held, and its address set."""
        for name, value in values.items():
            self.keep(name, value)

    def keep(self, name: str, value: Any) -> None:
        """Set one field, as `hold`."""
        held = self.__dict__.setdefault("held", {})
        if isinstance(value, tuple):
            tensor, shape, dtype = value
            held[name] = tensor
            value = address(tensor, shape, dtype)
        elif isinstance(value, ctypes.Structure | ctypes.Array):
            held[name] = value
            if dict(self._fields_)[name] is ctypes.c_void_p:  # type: ignore[arg-type]
                value = ctypes.addressof(value)
        setattr(self, name, value)


def fields(text: str) -> list[tuple[str, type]]:
    """Return fields of 8 bytes: `*name` an address, `name` an integer, `name.` a double."""
    kinds = {"*": ctypes.c_void_p, ".": ctypes.c_double}
    found: list[tuple[str, type]] = []
    for word in text.split():
        kind = kinds.get(word[0]) or kinds.get(word[-1]) or ctypes.c_int64
        found.append((word.strip("*."), kind))
    return found
