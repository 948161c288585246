"""The policy's weights on their way to vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import Tensor

from alignlab.models.decoder import causal_lm
from alignlab.models.fingerprints import tensor_digests
from alignlab.models.hub.export import Model, adapter_tensors, merged_tensors
from alignlab.rollout.verification import adapter_digests
from alignlab.rollout.vllm.backend import Transfer


@dataclass(frozen=True)
class PolicyWeights:
    """All weights of the policy, an adapter merged in; or its adapter alone.

    Attributes:
        model: the policy.
        tensors: by name: those of a checkpoint of the model, or of the adapter.
        adapter_config: PEFT's, where the tensors are an adapter's; otherwise None.
    """

    model: Model
    tensors: Mapping[str, Tensor]
    adapter_config: Mapping[str, Any] | None

    @property
    def size(self) -> Transfer:
        """Number and bytes of the tensors."""
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())
        return Transfer(len(self.tensors), num_bytes)

    def digests(self) -> dict[str, str]:
        """Return the digest of each tensor as vLLM has to report it, by vLLM's names."""
        if self.adapter_config is None:
            return tensor_digests(self.tensors)
        assert isinstance(self.model, PeftModel)
        return adapter_digests(self.model, self.tensors, causal_lm(self.model).dtype)


def read_weights(model: Model, *, adapter_only: bool) -> PolicyWeights:
    """Return the policy's present weights; tensors share the model's memory where they can.

    Raises:
        ConfigError: the adapter cannot be merged into the weights.
    """
    if not adapter_only:
        return PolicyWeights(model, merged_tensors(model), None)
    assert isinstance(model, PeftModel)
    return PolicyWeights(model, adapter_tensors(model), model.peft_config[model.active_adapter].to_dict())
