"""A frozen module whose weights lie on the host, and are on a GPU only while it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class HostWeights:
    """The weights of a frozen module, moved to the host; the module's own are these while it does not compute.

    The host's copy is the only one that lasts, so that nothing is ever copied back.

    Args:
        module: on `device`; its buffers stay there.
        device: on which the module computes.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._module, self._device = module, device
        self._on_host = {name: _pinned(weight) for name, weight in module.named_parameters()}
        self._put(self._on_host)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the weights on the device within the context."""
        self._put({name: weight.to(self._device, non_blocking=True) for name, weight in self._on_host.items()})
        try:
            yield
        finally:
            self._put(self._on_host)

    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Replace the module's parameters; one that stands in several places is replaced in all."""
        replaced = {
            id(parameter): nn.Parameter(tensors[name], requires_grad=False)
            for name, parameter in self._module.named_parameters()
        }
        for module in self._module.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = replaced[id(parameter)]


def _pinned(weight: Tensor) -> Tensor:
    """Return a tensor on the host, from which a GPU reads by itself."""
    host = weight.detach().cpu()
    return host.pin_memory() if torch.cuda.is_available() else host
