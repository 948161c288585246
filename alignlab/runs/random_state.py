"""The exact state of all random generators that a run draws from, as tensors and JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """State of the random generators of one rank.

    Attributes:
        tensors: "torch", "numpy", "python", and, if CUDA is in use, "cuda" of the rank's device.
        state: fields of numpy's and Python's states that are no tensors, as JSON.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    state: Mapping[str, Any] = field(default_factory=dict)


def random_state() -> RandomState:
    """Return the state of the global generators of torch (CPU and CUDA), Python and numpy."""
    version, words, python_gauss = random.getstate()
    name, keys, position, has_gauss, numpy_gauss = np.random.get_state(legacy=True)
    tensors = {
        "torch": torch.get_rng_state(),
        "python": torch.tensor(words, dtype=torch.int64),
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    if torch.cuda.is_initialized():
        tensors["cuda"] = torch.cuda.get_rng_state()
    state = {
        "python": {"version": version, "gauss": python_gauss},
        "numpy": {
            "name": str(name),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "gauss": float(numpy_gauss),
        },
    }
    return RandomState(tensors, state)


def restore_random_state(saved: RandomState) -> None:
    """Restore the generators to a state that `random_state` returned."""
    torch.set_rng_state(saved.tensors["torch"])
    if "cuda" in saved.tensors:
        torch.cuda.set_rng_state(saved.tensors["cuda"])
    python, numpy = saved.state["python"], saved.state["numpy"]
    random.setstate((python["version"], tuple(saved.tensors["python"].tolist()), python["gauss"]))
    keys = saved.tensors["numpy"].numpy().astype(np.uint32)
    np.random.set_state((numpy["name"], keys, numpy["position"], numpy["has_gauss"], numpy["gauss"]))


def seed_anew(text: str) -> None:
    """Set all generators by a text: alike in every process and version for the same text."""
    bits = random.Random(text)  # through SHA-512
    torch.manual_seed(bits.getrandbits(63))  # of GPUs too
    np.random.seed(bits.getrandbits(32))
    random.seed(bits.getrandbits(64))


def packed(saved: RandomState) -> bytes:
    """Return a state as bytes, to be sent to another rank."""
    state = torch.frombuffer(bytearray(json.dumps(saved.state).encode()), dtype=torch.uint8)
    return save({**saved.tensors, "state": state})


def unpacked(content: bytes) -> RandomState:
    """Return the state in the bytes that `packed` returned."""
    tensors = load(content)
    return RandomState(tensors, json.loads(bytes(tensors.pop("state").tolist())))
