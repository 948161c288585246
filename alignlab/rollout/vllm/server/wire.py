"""Weights and expert choices as they travel: safetensors, and numpy's own format in base64. Nothing is unpickled."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_ADAPTER = "adapter_config"
_IN_MEMORY = Path("/dev/shm")
_PREFIX = "alignlab-weights-"
_SPARE = 1.2


def memory_folder(num_bytes: int = 0) -> str | None:
    """Where files lie in memory; None where there is no such place or no room in it: the usual temporary folder serves.

    Args:
        num_bytes: that are to be written.
    """
    if not _IN_MEMORY.is_dir() or shutil.disk_usage(_IN_MEMORY).free < num_bytes * _SPARE:
        return None
    return str(_IN_MEMORY)


def temporary_folder(num_bytes: int = 0) -> tempfile.TemporaryDirectory[str]:
    """A folder in memory; those of processes that were killed before they could remove theirs go now."""
    place = memory_folder(num_bytes)
    for left in Path(place or tempfile.gettempdir()).glob(f"{_PREFIX}*-*"):
        number = left.name.removeprefix(_PREFIX).partition("-")[0]
        if number.isdigit() and not psutil.pid_exists(int(number)):
            shutil.rmtree(left, ignore_errors=True)
    return tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{os.getpid()}-", dir=place)


@contextmanager
def weights_file(tensors: Mapping[str, Tensor], adapter: Mapping[str, Any] | None) -> Iterator[Path]:
    """A file of tensors and, for an adapter's, its PEFT config; gone afterwards."""
    told = {"format": "pt"} | ({} if adapter is None else {_ADAPTER: json.dumps(dict(adapter), default=list)})
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with temporary_folder(size) as folder:
        path = Path(folder) / "weights.safetensors"
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path, metadata=told)
        yield path


def adapter_config(path: Path) -> dict[str, Any] | None:
    """The PEFT config in a file of weights; None where they are a whole model's."""
    with safe_open(path, framework="pt") as file:
        text = (file.metadata() or {}).get(_ADAPTER)
    return None if text is None else json.loads(text)


def encode_routing(record: Tensor) -> str:
    """Expert choices [tokens, L, K] as text, in the form in which vLLM sends its own."""
    buffer = io.BytesIO()
    np.save(buffer, record.numpy(), allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


def decode_routing(text: str) -> Tensor:
    """What `encode_routing` was given."""
    return torch.from_numpy(np.load(io.BytesIO(base64.b64decode(text)), allow_pickle=False).astype(np.int16))
