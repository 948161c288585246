"""The two ways in which a policy's weights travel to vLLM: all of them, an adapter merged in; or the adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

from peft import PeftModel
from torch import Tensor
from vllm import LLM
from vllm.lora.request import LoRARequest

from alignlab.models.export import Model, adapter_tensors, merged_tensors
from alignlab.rollout.vllm import transfer
from alignlab.rollout.vllm.options import adapter_options, check_adapter, merged_options
from alignlab.rollout.weight_proof import adapter_digests, check_arrived, digests


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
        self.options: dict[str, Any] = merged_options()
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
        rank = check_adapter(model)
        assert isinstance(model, PeftModel)
        self._model = model
        self.options: dict[str, Any] = adapter_options(rank, num_versions=1)
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
        check_arrived(adapter_digests(self._model, sent, dtype), arrived)
