"""The kernels' C interface.

Shapes: N tokens, H heads, K kv heads, D head size, V size of a value's head, B segments.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from alignlab.native.binding import Held, fields
from alignlab.native.build import BuildError, load_library

SOURCE = Path(__file__).parent / "source" / "attention.cpp"
LANES = 16
ALL_TOKENS = 1 << 40
"""A window that holds all tokens."""


class TensorStruct(Held):
    """`Tensor` in source/problem.h."""

    _fields_: ClassVar = fields("*data head_stride token_stride")


class ProblemStruct(Held):
    """`Problem` in source/problem.h."""

    _fields_: ClassVar = [
        *((name, TensorStruct) for name in ("query", "key", "value", "output")),
        *((f"grad_{name}", TensorStruct) for name in ("output", "query", "key", "value")),
        *fields(
            "*logsumexp *sinks *grad_sinks *starts *lengths *prefixes num_segments num_tokens num_heads num_kv_heads "
            "size value_size window num_threads"
        ),
        ("scale", ctypes.c_float), ("softcap", ctypes.c_float),
    ]


def tensor_struct(tensor: Tensor, tokens: int, heads: int, size: int, dtype: torch.dtype) -> TensorStruct:
    """Return the structure of a tensor [1, heads, tokens, size], after checking that kernels can read it.

    Raises:
        ValueError: its shape, dtype, device or layout is another.
    """
    head_stride, token_stride, stride = tensor.stride()[1:]
    fits = tensor.shape == (1, heads, tokens, size) and tensor.dtype == dtype and tensor.device.type == "cpu"
    odd = (tensor.data_ptr() | head_stride * dtype.itemsize | token_stride * dtype.itemsize) % 4
    if not fits or stride != 1 or odd:
        raise ValueError(
            f"a kernel reads {dtype} of shape {(1, heads, tokens, size)}, a head's numbers side by side on a CPU, and "
            f"was given {tensor.dtype} of shape {tuple(tensor.shape)}, strides {tensor.stride()}, on {tensor.device}"
        )
    struct = TensorStruct(tensor.data_ptr(), head_stride, token_stride)
    struct.__dict__["held"] = tensor
    return struct


class Kernels:
    """The compiled kernels for one dtype.

    Raises:
        BuildError: they could not be compiled, or are not of this package.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._library = load_library(SOURCE, dtype)
        size = self._library.alignlab_attention_problem_size
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(ProblemStruct):
            raise BuildError(f"the structure of the compiled kernels has {size()} bytes, which is not ours")

    def forward(self, problem: ProblemStruct) -> None:
        """Write the output and the logarithms of the softmax's sums."""
        self._library.alignlab_attention_forward(ctypes.byref(problem))

    def backward(self, problem: ProblemStruct) -> None:
        """Write the gradients."""
        self._library.alignlab_attention_backward(ctypes.byref(problem))


@cache
def kernels_of(dtype: torch.dtype) -> Kernels:
    """Return the kernels for a dtype, which are compiled and loaded once in a process.

    Raises:
        BuildError: see `Kernels`.
    """
    return Kernels(dtype)
