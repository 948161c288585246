"""The two ways in which vLLM in this process takes over weights: all of them, or an adapter alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from vllm import LLM
from vllm.lora.request import LoRARequest

from alignlab.rollout.vllm.inside import transfer
from alignlab.rollout.vllm.policy_weights import PolicyWeights


class WeightSync(Protocol):
    """One of the two ways.

    Attributes:
        lora_request: adapter that vLLM has to generate with; None for vLLM's own weights.
    """

    lora_request: LoRARequest | None

    def load(self, llm: LLM, weights: PolicyWeights, policy_version: int, attempt: int) -> None:
        """Let vLLM generate from `weights` from now on; see `Backend.put_weights` for the numbers."""
        ...

    def arrived(self, llm: LLM) -> Mapping[str, str]:
        """Return the digest of each tensor that vLLM loaded last, by name."""
        ...


class FullSync:
    """Replaces every tensor of the checkpoint, through vLLM's interface for weight updates."""

    lora_request: LoRARequest | None = None

    def __init__(self) -> None:
        transfer.register()

    def load(self, llm: LLM, weights: PolicyWeights, policy_version: int, attempt: int) -> None:
        """Replace all weights."""
        key = f"policy-{policy_version}-{attempt}"
        with transfer.offering(key, weights.tensors):
            llm.start_weight_update()
            llm.update_weights({"update_info": {"key": key}})
            llm.finish_weight_update(str(policy_version))

    def arrived(self, llm: LLM) -> Mapping[str, str]:
        """Return the digests of the tensors as vLLM's loader took them."""
        [digests] = llm.collective_rpc("alignlab_arrived")
        return dict(digests)


class AdapterSync:
    """Loads the adapter under a name that was never used: vLLM finds cached prefixes by the adapter's name."""

    def __init__(self) -> None:
        self.lora_request: LoRARequest | None = None

    def load(self, llm: LLM, weights: PolicyWeights, policy_version: int, attempt: int) -> None:
        """Load the adapter under a new name, and unload the one before it."""
        assert weights.adapter_config is not None
        previous = self.lora_request
        if previous is None:
            llm.collective_rpc("alignlab_take_adapters_from_memory")
        name = f"policy-{policy_version}-{attempt}"
        with transfer.offering(name, weights.tensors, weights.adapter_config):
            request = LoRARequest(name, attempt, f"{transfer.MEMORY}{name}")
            llm.llm_engine.add_lora(request)
        self.lora_request = request
        if previous is not None:
            llm.llm_engine.remove_lora(previous.lora_int_id)
        llm.llm_engine.set_weight_version(str(policy_version))

    def arrived(self, llm: LLM) -> Mapping[str, str]:
        """Return the digests of the matrices in the memory that vLLM multiplies with."""
        assert self.lora_request is not None
        [digests] = llm.collective_rpc("alignlab_adapter_arrived", args=(self.lora_request.lora_int_id,))
        return dict(digests)
