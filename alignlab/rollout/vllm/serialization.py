"""Serialization of weights (safetensors) and of expert choices (numpy's format). Nothing is unpickled."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from alignlab.files.library_errors import writing
from alignlab.files.private_folders import temporary_folder
from alignlab.files.tensor_files import write_streamed

_ADAPTER_CONFIG = "adapter_config"
_MAX_CONFIG_CHARACTERS = 2**20
_MAX_EXPERT = 2**15 - 1
_FIRST_BYTES = 4


@contextmanager
def weights_file(
    tensors: Iterable[tuple[str, Tensor]], shapes: Mapping[str, Tensor], adapter: Mapping[str, Any] | None
) -> Iterator[Path]:
    """Write tensors to a file, one after another; it is removed afterwards.

    Args:
        shapes: of all tensors, see `write_streamed`.
        adapter: PEFT config, if the tensors are an adapter's.
    """
    metadata = {"format": "pt"}
    if adapter is not None:
        metadata[_ADAPTER_CONFIG] = json.dumps(dict(adapter), default=list)
    size = sum(shape.nbytes for shape in shapes.values())
    with temporary_folder(size) as folder:
        path = Path(folder) / "weights.safetensors"
        with writing(path, "the weights for vLLM's servers"):
            write_streamed(tensors, shapes, path, metadata)
        yield path


def adapter_config(path: Path) -> dict[str, Any] | None:
    """Return the PEFT config in a file of weights; None if the weights are a whole model's.

    Raises:
        SafetensorError: the file is not a safetensors file.
        ValueError: the config is not a JSON object, or too long.
    """
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_ADAPTER_CONFIG)
    if text is None:
        return None
    if len(text) > _MAX_CONFIG_CHARACTERS:
        raise ValueError(f"an adapter's config must have at most {_MAX_CONFIG_CHARACTERS:,} characters")
    config = json.loads(text)
    if not isinstance(config, dict):
        raise ValueError("an adapter's config must be an object")
    return config


def encode_routing(record: Tensor) -> bytes:
    """Return expert choices [tokens, L, K] int16, -1 if unknown, as bytes.

    They are the number of tokens without a record before the first with one, in 4 bytes, and the choices of all tokens
    from there on in numpy's format: in one byte each, if all are known and below 256.
    """
    choices = record.numpy()
    [known] = np.nonzero((choices >= 0).any(axis=(1, 2)))
    first = int(known[0]) if len(known) else len(choices)
    rest = choices[first:]
    fits_in_a_byte = rest.size > 0 and rest.min() >= 0 and rest.max() < 256
    buffer = io.BytesIO()
    np.save(buffer, rest.astype(np.uint8) if fits_in_a_byte else rest, allow_pickle=False)
    return first.to_bytes(_FIRST_BYTES, "little") + buffer.getvalue()


def decode_routing(content: bytes) -> tuple[int, Tensor]:
    """Return (number of tokens without a record, choices of those after them [tokens, L, K] int16).

    Args:
        content: result of `encode_routing`.

    Raises:
        ValueError: the content is not in that format.
    """
    return int.from_bytes(content[:_FIRST_BYTES], "little"), _choices(content[_FIRST_BYTES:])


def decode_vllms_routing(text: Any) -> Tensor:
    """Return the expert choices [tokens, all layers, K] int16 of an answer of vLLM's: numpy's format in base64.

    Raises:
        ValueError: the text is not in that format.
    """
    if not isinstance(text, str):
        raise ValueError("experts must be told in base64")
    return _choices(base64.b64decode(text, validate=True))


def _choices(content: bytes) -> Tensor:
    """Return a record in numpy's format as int16; a shape that the content has no bytes for allocates no memory."""
    buffer = io.BytesIO(content)
    version = np.lib.format.read_magic(buffer)
    if version != (1, 0):
        raise ValueError(f"experts must be told in numpy's format 1.0, and are in {version[0]}.{version[1]}")
    shape, in_fortran_order, dtype = np.lib.format.read_array_header_1_0(buffer)
    values = buffer.read()
    if len(shape) != 3 or dtype.kind not in "iu" or math.prod(shape) * dtype.itemsize != len(values):
        raise ValueError("experts must be told as whole numbers [tokens, layers, K]")
    record = np.frombuffer(values, dtype).reshape(shape, order="F" if in_fortran_order else "C")
    if record.size and (record.min() < -1 or record.max() > _MAX_EXPERT):
        raise ValueError(f"experts must be -1 to {_MAX_EXPERT}")
    return torch.from_numpy(record.astype(np.int16))
