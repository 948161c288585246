"""The two ways in which a policy's weights travel to vLLM: all of them, an adapter merged in; or the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor
from vllm import LLM
from vllm.lora.request import LoRARequest

from alignlab.errors import ConfigError
from alignlab.models.adapters import has_adapters
from alignlab.models.export import Model, adapter_tensors, merged_tensors
from alignlab.rollout.vllm import transfer
from alignlab.rollout.weight_proof import check_arrived, digest, digests

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class WeightSync(Protocol):
    """Attributes:
    options: what vLLM's constructor is told for it.
    request: with which vLLM generates from the weights that were sent last; None is its own weights.
    """

    options: dict[str, Any]
    request: LoRARequest | None

    def send(self, llm: LLM, policy_version: int) -> Mapping[str, Tensor]:
        """Have vLLM use the policy's present weights; returns what travelled."""
        ...

    def check(self, llm: LLM, sent: Mapping[str, Tensor]) -> None:
        """Raises:
        RolloutError: what vLLM holds is not what was sent.
        """
        ...


class MergedSync:
    """Every tensor of the checkpoint travels, through vLLM's interface for weight updates."""

    def __init__(self, model: Model) -> None:
        self.request: LoRARequest | None = None
        self.options: dict[str, Any] = {"weight_transfer_config": {"backend": transfer.BACKEND}}
        self._model = model
        transfer.register()

    def send(self, llm: LLM, policy_version: int) -> Mapping[str, Tensor]:
        """Replace all weights."""
        tensors, key = merged_tensors(self._model), str(id(self))
        with transfer.offering(key, tensors):
            llm.start_weight_update()
            llm.update_weights({"update_info": {"key": key}})
            llm.finish_weight_update(str(policy_version))
        return tensors

    def check(self, llm: LLM, sent: Mapping[str, Tensor]) -> None:
        """Compare digests of what was sent and of what the model's loader took."""
        [arrived] = llm.collective_rpc("alignlab_arrived")
        check_arrived(digests(sent), arrived)


class AdapterSync:
    """The adapter's tensors travel, under a name that was never used: vLLM finds cached prefixes by it.

    Raises:
        ConfigError: the policy has no adapter, or one that vLLM cannot apply.
    """

    def __init__(self, model: Model) -> None:
        if not isinstance(model, PeftModel) or not has_adapters(model):
            raise ConfigError("rollout.sync is adapter, and the policy has none; use merged, or give model.lora")
        self._model = model
        config: Any = model.peft_config[model.active_adapter]
        if config.r > _RANKS[-1] or config.rank_pattern:
            raise ConfigError(
                f"the adapter has rank {config.r} (rank_pattern {config.rank_pattern}), and must have one rank of at "
                f"most {_RANKS[-1]} to travel alone; use rollout.sync: merged"
            )
        room = next(rank for rank in _RANKS if rank >= config.r)
        self.options: dict[str, Any] = {"enable_lora": True, "max_lora_rank": room, "max_loras": 1, "max_cpu_loras": 2}
        self.request: LoRARequest | None = None
        self._prepared = False

    def send(self, llm: LLM, policy_version: int) -> Mapping[str, Tensor]:
        """Load the adapter under a new name, and unload the one before it."""
        if not self._prepared:
            llm.collective_rpc("alignlab_take_adapters_from_memory")
            self._prepared = True
        number = self.next_number()
        name = f"policy-{policy_version}-{number}"
        tensors = adapter_tensors(self._model)
        config = asdict(self._model.peft_config[self._model.active_adapter])
        with transfer.offering(name, tensors, config):
            request = LoRARequest(name, number, f"{transfer.MEMORY}{name}")
            llm.llm_engine.add_lora(request)
        before, self.request = self.request, request
        if before is not None:
            llm.llm_engine.remove_lora(before.lora_int_id)
        llm.llm_engine.set_weight_version(str(policy_version))
        return tensors

    def next_number(self) -> int:
        """vLLM's number of the next adapter, never used before."""
        return 1 if self.request is None else self.request.lora_int_id + 1

    def check(self, llm: LLM, sent: Mapping[str, Tensor]) -> None:
        """Compare digests of both matrices of every layer with those in the memory that vLLM multiplies with."""
        assert self.request is not None
        [arrived] = llm.collective_rpc("alignlab_adapter_arrived", args=(self.request.lora_int_id,))
        dtype = llm.llm_engine.vllm_config.lora_config.lora_dtype
        check_arrived(_expected(self._model, sent, dtype), arrived)


def _expected(model: PeftModel, sent: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, str]:
    """Digests by name of what vLLM holds of the adapter: rounded to its dtype, the scale in the second matrix."""
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    expected = {}
    for name, tensor in sent.items():
        module, _, matrix = name.removesuffix(".weight").rpartition(".")
        value = tensor.detach().to(dtype)
        if matrix == "lora_B":
            value = value * layers[module].scaling[model.active_adapter]
        expected[f"{module.removeprefix('base_model.model.')}.{matrix}"] = digest(value)
    return expected
