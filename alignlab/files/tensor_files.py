"""Files of tensors in the safetensors format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import TensorSpec, serialize_file
from torch import Tensor

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}
"""Names of dtypes in the format."""
_ALIGNMENT = 8
"""Bytes; of the length of the header."""


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors. Those that share memory, as tied weights do, are written once under each name.

    `safetensors.torch.save_file` refuses shared memory, and so depends on where tensors lie.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}  # alive until written
    specs = {
        name: TensorSpec(
            dtype=str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape), data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in plain.items()
    }
    serialize_file(specs, path, metadata=dict(metadata) if metadata is not None else None)


def write_streamed(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Tensor], path: Path,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors as safetensors, one after another, so that no more than one of them need be in memory.

    Args:
        tensors: (name, tensor), in any order.
        shapes: of all tensors, with their dtypes, known before; on the device "meta".

    Raises:
        OSError: the file cannot be written.
    """
    # As in files of the library, the widest dtypes come first, so that each tensor is aligned to its own.
    order = sorted(shapes, key=lambda name: -shapes[name].itemsize)
    starts, size = {}, 0
    for name in order:
        starts[name], size = size, size + shapes[name].nbytes
    header: dict[str, object] = {
        name: {
            "dtype": _NAMES[shapes[name].dtype], "shape": list(shapes[name].shape),
            "data_offsets": [starts[name], starts[name] + shapes[name].nbytes],
        }
        for name in order
    }
    if metadata is not None:
        header["__metadata__"] = dict(metadata)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    missing = dict(starts)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors:
            expected = shapes[name]
            assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape), name
            file.seek(8 + len(text) + missing.pop(name))
            file.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    assert not missing, sorted(missing)
