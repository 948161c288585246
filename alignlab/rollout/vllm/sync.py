"""The two ways in which vLLM in this process takes over weights: all of them, or an adapter alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from vllm import LLM
from vllm.lora.request import LoRARequest

from alignlab.rollout.vllm.inside import transfer
from alignlab.rollout.vllm.policy_weights import PolicyWeights
from alignlab.rollout.vllm.protocol import digests_of_workers
from alignlab.rollout.vllm.serialization import weights_file


class WeightSync(Protocol):
    """One of the two ways.

    Attributes:
        lora_request: adapter that vLLM has to generate with; None for vLLM's own weights.
        sleep_level: level of vLLM's sleep between updates: 1 moves weights to the host, 2 drops them.
    """

    lora_request: LoRARequest | None
    sleep_level: int

    def load(self, llm: LLM, weights: PolicyWeights, policy_version: int, attempt: int) -> None:
        """Let vLLM generate from `weights` from now on; see `Backend.put_weights` for the numbers."""
        ...

    def arrived(self, llm: LLM) -> Mapping[str, str]:
        """Return the digest of each tensor that vLLM loaded last, by name."""
        ...


class FullSync:
    """Replaces every tensor of the checkpoint, through vLLM's interface for weight updates.

    Args:
        by_file: vLLM's workers are processes of their own, and read a file in memory.
    """

    lora_request: LoRARequest | None = None
    sleep_level = 2
    """vLLM drops its weights while it sleeps: the next update brings them all."""

    def __init__(self, *, by_file: bool) -> None:
        transfer.register()
        self._by_file = by_file

    def load(self, llm: LLM, weights: PolicyWeights, policy_version: int, attempt: int) -> None:
        """Replace all weights."""
        with self._offered(weights, f"policy-{policy_version}-{attempt}") as key:
            llm.start_weight_update()
            llm.update_weights({"update_info": {"key": key}})
            llm.finish_weight_update(str(policy_version))

    def arrived(self, llm: LLM) -> Mapping[str, str]:
        """Return the digests of the tensors as the loaders of vLLM's workers took them."""
        return digests_of_workers(llm.collective_rpc("alignlab_arrived"))

    @contextmanager
    def _offered(self, weights: PolicyWeights, name: str) -> Iterator[str]:
        """Offer tensors to vLLM's workers within this context; yield the key."""
        if self._by_file:
            with weights_file(weights, weights.shapes(), None) as path:
                yield f"{transfer.FILE}{path}"
        else:
            with transfer.offering(name, weights):
                yield name


class AdapterSync:
    """Loads the adapter under a name that was never used: vLLM finds cached prefixes by the adapter's name."""

    sleep_level = 1
    """The base under the adapter is not sent again."""

    def __init__(self) -> None:
        self.lora_request: LoRARequest | None = None

    def load(self, llm: LLM, weights: PolicyWeights, policy_version: int, attempt: int) -> None:
        """Load the adapter under a new name, and unload the one before it."""
        assert weights.adapter_config is not None
        previous = self.lora_request
        if previous is None:
            llm.collective_rpc("alignlab_take_adapters_from_memory")
        name = f"policy-{policy_version}-{attempt}"
        with transfer.offering(name, weights, weights.adapter_config):
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
