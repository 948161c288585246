"""Files of tensors in the safetensors format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import TensorSpec, serialize_file
from torch import Tensor


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
