"""The policy's weights on their way to vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from peft import PeftModel
from torch import Tensor

from alignlab.models.adapters import adapter_state_names
from alignlab.models.decoder import causal_lm
from alignlab.models.hub.export import Model, adapter_tensors, merged_tensors
from alignlab.models.sync_digests import sync_digests
from alignlab.models.weight_view import HeldWeights, WeightView, view_of, whole_tensors
from alignlab.rollout.verification import adapter_digests
from alignlab.rollout.vllm.backend import Transfer
from alignlab.rollout.vllm.ranks import this_rank


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

    def digests(self, algorithm: str | None = None) -> dict[str, str]:
        """Return the digest of each tensor as vLLM has to report it, by vLLM's names.

        Args:
            algorithm: of vLLM's device; default: that of each tensor's own.
        """
        if self.adapter_config is None:
            return sync_digests(self.tensors, algorithm=algorithm)
        assert isinstance(self.model, PeftModel)
        return adapter_digests(self.model, self.tensors, causal_lm(self.model).dtype, algorithm=algorithm)


def gather_weights(model: Model, *, adapter_only: bool, weights: WeightView | None = None) -> HeldWeights:
    """Return the whole tensors that an update is made from; none on ranks but the first, which do not send.

    This may be a collective operation: every rank calls it, and reads the same names in the same order.

    Args:
        model: the policy.
        adapter_only: read the adapter alone.
        weights: view of `model`; default: `view_of` it.
    """
    weights = weights or view_of(model)
    names = adapter_state_names(cast(PeftModel, model), weights) if adapter_only else weights.names()
    sends = this_rank() == 0
    return HeldWeights({name: tensor for name, tensor in whole_tensors(weights, names) if sends})


def updated_weights(model: Model, weights: WeightView, *, adapter_only: bool) -> PolicyWeights:
    """Return the policy's present weights as vLLM takes them; tensors share the memory of `weights` where they can.

    Args:
        model: the policy.
        weights: what `gather_weights` has read on the first rank.
        adapter_only: return the adapter alone.

    Raises:
        ConfigError: the adapter cannot be merged into the weights.
    """
    if not adapter_only:
        return PolicyWeights(model, merged_tensors(model, weights), None)
    assert isinstance(model, PeftModel)
    config = model.peft_config[model.active_adapter].to_dict()
    return PolicyWeights(model, adapter_tensors(model, weights=weights), config)
