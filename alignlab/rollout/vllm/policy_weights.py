"""The policy's weights on their way to vLLM: a stream, of which no copy is held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from peft import PeftModel
from torch import Tensor

from alignlab.models.decoder import causal_lm
from alignlab.models.hub.export import Model, adapter_tensors, checkpoint_shapes, streamed_tensors
from alignlab.models.shards import is_spread
from alignlab.models.sync_digests import PendingDigests
from alignlab.models.weight_view import WeightView
from alignlab.rollout.verification import adapter_digests
from alignlab.rollout.vllm.backend import Transfer


class PolicyWeights:
    """All weights of the policy, an adapter merged in, as a stream that is read once; or its adapter alone.

    Weights that are spread over ranks are gathered as the stream is read: every rank reads it to its end, whether or
    not it needs the tensors.

    Args:
        model: the policy.
        adapter_only: the adapter alone is sent.
        weights: view of `model`; default: `view_of` it.

    Attributes:
        adapter_config: PEFT's, where the tensors are an adapter's; otherwise None.
        has_digests: whether digests are computed while the stream is read.
        digest_algorithm: of vLLM's device, to be set before; default: that of each tensor's own.

    Raises:
        ConfigError: while the stream is read: the adapter cannot be merged into the weights.
    """

    def __init__(self, model: Model, *, adapter_only: bool, weights: WeightView | None = None) -> None:
        self._weights = weights
        self._model, self._is_spread = model, is_spread(model)
        self.has_digests = True
        self.digest_algorithm: str | None = None
        self._pending, self._num_tensors, self._num_bytes = PendingDigests(), 0, 0
        self.adapter_config: Mapping[str, Any] | None = None
        self._adapter: dict[str, Tensor] = {}
        if adapter_only:
            assert isinstance(model, PeftModel)
            self.adapter_config = model.peft_config[model.active_adapter].to_dict()
            self._adapter = adapter_tensors(model, weights=weights)
            self._stream = iter(self._adapter.items())
        else:
            self._stream = streamed_tensors(model, weights)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, tensor): those of a checkpoint of the model, or of the adapter."""
        for name, tensor in self._stream:
            if self.has_digests and not self._adapter:
                self._pending.add(name, tensor, algorithm=self.digest_algorithm)
            self._num_tensors += 1
            self._num_bytes += tensor.numel() * tensor.element_size()
            yield name, tensor

    def shapes(self) -> dict[str, Tensor]:
        """Return the tensors of the stream without numbers; the stream is not read for that."""
        if self._adapter:
            return {name: tensor.to("meta") for name, tensor in self._adapter.items()}
        return checkpoint_shapes(self._model, self._weights)

    def finish(self) -> None:
        """Read what is left of weights that are spread over ranks, for which other ranks wait."""
        for _ in self._stream if self._is_spread else ():
            pass

    @property
    def size(self) -> Transfer:
        """Number and bytes of the tensors that were read."""
        return Transfer(self._num_tensors, self._num_bytes)

    def digests(self) -> dict[str, str]:
        """Return the digest of each tensor that was read, as vLLM has to report it, by vLLM's names."""
        if self.adapter_config is None:
            return self._pending.read()
        assert isinstance(self._model, PeftModel)
        return adapter_digests(
            self._model, self._adapter, causal_lm(self._model).dtype, algorithm=self.digest_algorithm
        )
