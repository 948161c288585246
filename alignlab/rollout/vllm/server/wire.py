"""Weights and expert choices as they travel: safetensors, and numpy's own format in base64. Nothing is unpickled."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_ADAPTER = "adapter_config"
_IN_MEMORY = Path("/dev/shm")


def memory_folder() -> str | None:
    """Where files lie in memory; None where the system has no such place, and an ordinary temporary folder serves."""
    return str(_IN_MEMORY) if _IN_MEMORY.is_dir() else None


@contextmanager
def weights_file(tensors: Mapping[str, Tensor], adapter: Mapping[str, Any] | None) -> Iterator[Path]:
    """A file of tensors and, for an adapter's, its PEFT config; gone afterwards."""
    told = {"format": "pt"} | ({} if adapter is None else {_ADAPTER: json.dumps(dict(adapter), default=list)})
    with tempfile.TemporaryDirectory(prefix="alignlab-weights-", dir=memory_folder()) as folder:
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
