"""vLLM's interface for weight transfer, with tensors from memory, a file or a broadcast, and digests of what arrived.

vLLM creates the transfer engine in its worker, and calls its start, update and finish. In the trainer's process,
`offering` provides the tensors; on a server, whose worker is another process, a file or a process group with the
trainer does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from alignlab.files.private_folders import require_private
from alignlab.models.sync_digests import PendingDigests
from alignlab.rollout.vllm import packed_weights
from alignlab.rollout.vllm.inside import patches
from alignlab.rollout.vllm.protocol import TRANSFER_BACKEND
from alignlab.rollout.vllm.weight_group import Rendezvous, WeightGroup, join

MEMORY = "memory:"
FILE = "file:"
Named = Iterable[tuple[str, Tensor]]
Offer = tuple[Named, Mapping[str, Any]]
_offers: dict[str, Offer] = {}


@contextmanager
def offering(key: str, tensors: Named, config: Mapping[str, Any] | None = None) -> Iterator[None]:
    """Provide (name, tensor), and an adapter's config, to a worker of this process under a key, within this context."""
    _offers[key] = (tensors, config or {})
    try:
        yield
    finally:
        del _offers[key]


def offered(key: str) -> Offer:
    """Return (names and tensors, adapter's config) offered under a key."""
    return _offers[key]


def named_tensors(key: str, device: torch.device) -> Named:
    """Yield (name, tensor) of what is offered under a key, or of a safetensors file under file:PATH.

    Tensors of a file are read one at a time, to the device that they are bound for.
    """
    if not key.startswith(FILE):
        yield from offered(key)[0]
        return
    path = Path(key.removeprefix(FILE))
    require_private(path)
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  the file is no mapping
            yield name, file.get_tensor(name).to(device)


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Parameters of the connection: none."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """The source of the tensors: either of the two.

    Attributes:
        key: under which they are offered, or the path of a file.
        broadcast: fields of a `Broadcast`.
    """

    key: str = ""
    broadcast: dict[str, Any] | None = None


@dataclass(frozen=True)
class Broadcast:
    """Tensors that a trainer broadcasts.

    Attributes:
        rendezvous: fields of a `Rendezvous`.
        first_rank: rank of this vLLM's first worker in the group; the others follow.
        buffer_bytes: limit of a buffer that several tensors share.
        tensors: result of `shapes_to_json`.
    """

    rendezvous: dict[str, Any]
    first_rank: int
    buffer_bytes: int
    tensors: list[Any]


class OwnTransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """Loads the tensors of a checkpoint from this process's memory, a file, or a broadcast of the trainer's.

    Attributes:
        arrived: digests of every tensor that the model's loader took in the last update.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.arrived = PendingDigests()
        self._group: tuple[str, WeightGroup] | None = None  # by name

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Do nothing: there is no connection."""

    def start_weight_update(self) -> None:
        """Prepare the model for another load."""
        self.arrived = PendingDigests()
        patches.before_update(self.model)
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Load all tensors, and note their digests."""
        if update_info.broadcast is None:
            self.model.load_weights(self._with_digests(named_tensors(update_info.key, self.device)))
            return
        try:
            self._receive(Broadcast(**update_info.broadcast))
        except BaseException:
            self.shutdown()  # the others would wait for this worker
            raise

    def finish_weight_update(self) -> None:
        """Complete the load, and apply the patches."""
        finalize_layerwise_reload(self.model, self.model_config)
        patches.after_update(self.model)

    def shutdown(self) -> None:
        """Leave the group of the last broadcast."""
        if self._group is not None:
            self._group[1].close()
        self._group = None

    def _receive(self, broadcast: Broadcast) -> None:
        """Load the tensors that the trainer broadcasts."""
        group = self._joined(Rendezvous(**broadcast.rendezvous), broadcast.first_rank)
        shapes = packed_weights.shapes_from_json(broadcast.tensors)
        stream = packed_weights.receive(shapes, group, buffer_bytes=broadcast.buffer_bytes)
        self.model.load_weights(self._with_digests(stream))
        for _ in stream:  # every worker takes part in the whole broadcast, whatever its loader takes
            pass

    def _joined(self, rendezvous: Rendezvous, first_rank: int) -> WeightGroup:
        """Return the group of this name, which is joined unless this worker is in it."""
        if self._group is None or self._group[0] != rendezvous.name:
            self.shutdown()
            group = join(rendezvous, first_rank + self.parallel_config.rank, self.device)
            self._group = rendezvous.name, group
        return self._group[1]

    def _with_digests(self, tensors: Named) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors, each digested when the loader takes it; a tensor that it never takes has no digest."""
        for name, tensor in tensors:
            self.arrived.add(name, tensor)
            yield name, tensor


def register() -> None:
    """Register the engine with vLLM under `TRANSFER_BACKEND`; a second call does nothing."""
    if TRANSFER_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(TRANSFER_BACKEND, OwnTransferEngine)
