"""The weights that the engine runs on: the policy's own, or a merged copy of its adapted layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from alignlab.models.adapters import has_adapters, merged_weights


class EngineWeights:
    """Puts merged linear layers in the places of the adapted ones while the engine runs, and puts those back.

    Without adapters, or with `merge` false, the policy runs as it is and nothing is copied.
    """

    def __init__(self, model: nn.Module, *, merge: bool) -> None:
        self._model = model
        self._merge = merge and has_adapters(model)
        self._merged: dict[nn.Module, nn.Linear] = {}
        self.refresh()

    def refresh(self) -> None:
        """Merge the adapter's present weights."""
        if not self._merge:
            return
        for base, weight in merged_weights(self._model).items():
            if base in self._merged:
                self._merged[base].weight.data.copy_(weight)
            else:
                self._merged[base] = _linear_like(base, weight)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this context the model runs on these weights, in evaluation mode."""
        trained = [module for module in self._model.modules() if module.training]
        swapped = list(self._places())
        try:
            for module in trained:
                module.training = False
            for parent, name, layer in swapped:
                parent._modules[name] = self._merged[layer.get_base_layer()]
            yield
        finally:
            for parent, name, layer in swapped:
                parent._modules[name] = layer
            for module in trained:
                module.training = True

    def _places(self) -> Iterator[tuple[nn.Module, str, BaseTunerLayer]]:
        """(parent, name of the child, adapted layer) of every layer that has a merged copy."""
        if not self._merge:
            return
        for parent in self._model.modules():
            for name, child in parent.named_children():
                if isinstance(child, BaseTunerLayer) and child.get_base_layer() in self._merged:
                    yield parent, name, child


def _linear_like(base: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    """A linear layer with `weight`, and with the bias of `base` itself."""
    merged = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
    merged.weight = nn.Parameter(weight, requires_grad=False)
    merged.bias = base.bias
    return merged.eval()
