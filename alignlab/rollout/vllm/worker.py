"""What the trainer asks of vLLM's worker beside vLLM's own methods; vLLM mixes this class into its worker.

An adapter comes by vLLM's own `add_lora`, from a path of the form memory:KEY, which no file has: the tensors are those
that this process offered under the key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.request import LoRARequest

from alignlab.rollout.vllm.routing import RoutingRecorder
from alignlab.rollout.vllm.server.wire import encode_routing
from alignlab.rollout.vllm.transfer import MEMORY, offered
from alignlab.rollout.weight_proof import digest


class Inspection:
    """Methods for `collective_rpc`."""

    alignlab_recorder: RoutingRecorder
    weight_transfer_engine: Any
    model_runner: Any

    def alignlab_arrived(self) -> dict[str, str]:
        """Digest of every tensor that the last weight update loaded, by name."""
        return dict(self.weight_transfer_engine.arrived)

    def alignlab_record_routing(self) -> None:
        """Keep the experts chosen from now on."""
        self.alignlab_recorder = RoutingRecorder(self.model_runner)

    def alignlab_take_routing(self, request_ids: list[str], layers: list[int]) -> list[Tensor]:
        """Experts chosen for the tokens of each request; they are forgotten."""
        return self.alignlab_recorder.take(request_ids, layers)

    def alignlab_send_routing(self, request_id: str, layers: list[int]) -> str:
        """The same of one request, as text."""
        return encode_routing(self.alignlab_recorder.take([request_id], layers)[0])

    def alignlab_take_adapters_from_memory(self) -> None:
        """Let `add_lora` understand memory:KEY."""
        manager = self.model_runner.lora_manager
        manager._load_adapter = _from_memory(manager, manager._load_adapter)

    def alignlab_adapter_arrived(self, adapter_id: int) -> dict[str, str]:
        """Digest of both matrices of every module, read back from the memory that the adapter's products read.

        The second matrix holds the scale. Names are the modules', then `lora_A` or `lora_B`.
        """
        manager = self.model_runner.lora_manager._adapter_manager
        slot = manager.lora_index_to_id.index(adapter_id)
        rank = manager.get_adapter(adapter_id).rank
        found = {}
        for name, module in manager.modules.items():
            if not isinstance(module, BaseLinearLayerWithLoRA):
                continue
            parts = manager.packed_modules.get(name, [name])
            for part, down, up in zip(parts, module.lora_a_stacked, module.lora_b_stacked, strict=True):
                if down[slot].any():  # zeros are a module without an adapter
                    found[f"{part}.lora_A"] = digest(down[slot, 0, :rank])
                    found[f"{part}.lora_B"] = digest(up[slot, 0, :, :rank])
        return found


def _from_memory(manager: Any, from_disk: Callable[[LoRARequest], LoRAModel]) -> Callable[[LoRARequest], LoRAModel]:
    """A loader that takes memory:KEY from this process's offers, and hands every other path to `from_disk`."""

    def load(request: LoRARequest) -> LoRAModel:
        """The adapter that a request names."""
        if not request.lora_path.startswith(MEMORY):
            return from_disk(request)
        tensors, config = offered(request.lora_path.removeprefix(MEMORY))
        helper = PEFTHelper.from_dict(config)
        helper.validate_legal(manager.lora_config)
        # Copies, because vLLM multiplies the scale into the second matrix in place.
        copies: dict[str, Tensor] = {name: tensor.detach().clone() for name, tensor in tensors.items()}
        return LoRAModel.from_lora_tensors(
            request.lora_int_id, copies, helper, device="cpu", dtype=manager.lora_config.lora_dtype
        )

    return load
