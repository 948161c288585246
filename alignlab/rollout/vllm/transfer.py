"""How new weights reach vLLM: its own interface for that, with tensors handed over in memory, and a note of what came.

vLLM makes the engine in its worker and calls start, update and finish. In the trainer's process the other side is
`offering`; in a server, whose worker is a process of its own, it is a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from alignlab.rollout.vllm import mending
from alignlab.rollout.vllm.options import BACKEND
from alignlab.rollout.vllm.server.private_folders import require_private
from alignlab.rollout.weight_proof import digest

MEMORY = "memory:"
FILE = "file:"
Offer = tuple[Mapping[str, Tensor], Mapping[str, Any]]
_offers: dict[str, Offer] = {}


@contextmanager
def offering(key: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Within this context a worker of this process finds the tensors, and an adapter's config, under the key."""
    _offers[key] = (tensors, config or {})
    try:
        yield
    finally:
        del _offers[key]


def offered(key: str) -> Offer:
    """The tensors and config offered under a key; those of a safetensors file under file:PATH."""
    if not key.startswith(FILE):
        return _offers[key]
    path = Path(key.removeprefix(FILE))
    require_private(path)
    return load_file(path), {}


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """Under which key the tensors were offered."""

    key: str


class MemoryTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads tensors of a checkpoint that this process holds, or a file.

    Attributes:
        arrived: digest of every tensor of the last update as the model's loader took it, by name.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arrived: dict[str, str] = {}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Make the model ready to be loaded again."""
        self.arrived = {}
        mending.before_update(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load all tensors."""
        tensors, _ = offered(update_info.key)
        self.model.load_weights(self._noted(tensors))

    def finish_weight_update(self) -> None:
        """Put what was loaded to use."""
        finalize_layerwise_reload(self.model, self.model_config)
        mending.after_update(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""

    def _noted(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The tensors, each digested when the loader takes it: what it never asks for is missing from the note."""
        for name, tensor in tensors.items():
            self.arrived[name] = digest(tensor)
            yield name, tensor


def register() -> None:
    """Let vLLM find the engine by the name `BACKEND`; once a process is enough."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, MemoryTransferEngine)
