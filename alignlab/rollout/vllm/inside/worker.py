"""Methods that vLLM mixes into its worker: digests, routing records, adapters from memory.

An adapter in memory is loaded by vLLM's own `add_lora`, from a path memory:KEY: its tensors are those that this process
offers under the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from alignlab.models.sync_digests import sync_digests
from alignlab.rollout.vllm.inside.routing import RoutingRecorder
from alignlab.rollout.vllm.inside.transfer import MEMORY, offered
from alignlab.rollout.vllm.serialization import encode_routing
from alignlab.rollout.vllm.weight_group import card_of


class WorkerExtension:
    """Methods for `collective_rpc`."""

    alignlab_recorder: RoutingRecorder
    weight_transfer_engine: Any
    model_runner: Any
    device: torch.device

    def alignlab_arrived(self) -> dict[str, str]:
        """Return the digest of every tensor that the last weight update loaded, by name."""
        digests: dict[str, str] = self.weight_transfer_engine.arrived.read()
        return digests

    def alignlab_card(self) -> str:
        """Return the identity of this worker's GPU; an empty text on a CPU."""
        return card_of(self.device)

    def alignlab_record_routing(self) -> None:
        """Record the experts chosen from now on."""
        self.alignlab_recorder = RoutingRecorder(self.model_runner)

    def alignlab_take_routing(self, request_ids: list[str], layers: list[int]) -> list[Tensor]:
        """Return and forget the experts chosen for the tokens of each request."""
        return self.alignlab_recorder.take(request_ids, layers)

    def alignlab_send_routing(self, request_id: str, layers: list[int]) -> bytes:
        """Return and forget the experts chosen for one request, as bytes."""
        return encode_routing(self.alignlab_recorder.take([request_id], layers)[0])

    def alignlab_take_adapters_from_memory(self) -> None:
        """Let `add_lora` load memory:KEY."""
        manager = self.model_runner.lora_manager
        manager._load_adapter = _from_memory(manager, manager._load_adapter)

    def alignlab_adapter_arrived(self, adapter_id: int) -> dict[str, str]:
        """Return the digests of an adapter's matrices, read back from the memory that vLLM multiplies with.

        The scale is multiplied into the second matrix. Names are MODULE.lora_A and MODULE.lora_B.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        slot = manager.lora_index_to_id.index(adapter_id)
        rank = manager.get_adapter(adapter_id).rank
        matrices: dict[str, tuple[Tensor, Tensor]] = {}
        for name, module in manager.modules.items():
            if not isinstance(module, BaseLinearLayerWithLoRA):
                continue
            module_names = manager.packed_modules.get(name, [name])
            for part_name, down, up in zip(module_names, module.lora_a_stacked, module.lora_b_stacked, strict=True):
                matrices[part_name] = down[slot, 0, :rank], up[slot, 0, :, :rank]
        are_present = torch.stack([down.any() for down, _ in matrices.values()]).tolist()
        return sync_digests({
            f"{name}.{letter}": matrix
            for (name, pair), is_present in zip(matrices.items(), are_present, strict=True)
            for letter, matrix in zip(("lora_A", "lora_B"), pair, strict=True)
            if is_present  # zeros mean that the adapter has no matrices for this module
        })


def _from_memory(manager: Any, from_disk: Callable[[LoRARequest], LoRAModel]) -> Callable[[LoRARequest], LoRAModel]:
    """Return a loader that loads memory:KEY from this process's offers, and other paths by `from_disk`."""

    def load(request: LoRARequest) -> LoRAModel:
        """Return the adapter that a request names."""
        if not request.lora_path.startswith(MEMORY):
            return from_disk(request)
        tensors, config = offered(request.lora_path.removeprefix(MEMORY))
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(manager.lora_config)
        # Copies: vLLM multiplies the scale into the second matrix in place.
        copies: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in tensors}
        return LoRAModel.from_lora_tensors(
            request.lora_int_id, copies, helper, device="cpu", dtype=manager.lora_config.lora_dtype
        )

    return load
