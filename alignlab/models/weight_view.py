"""Weights by name, wherever they lie: the one way to read a model's parameters and buffers.

Exports, weight sync, digests, fingerprints and checkpoints read through a `WeightView`. They neither assume that a
module's parameter is whole on this rank, nor tell tensors apart by where they are in memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from alignlab.models.exact_weights import is_exact, rounded
from alignlab.models.pieces import gathered, held, whole_shape


class WeightView(Protocol):
    """The weights of one module, whose parameters may be spread over ranks."""

    def names(self) -> tuple[str, ...]:
        """Return the names of all parameters and saved buffers, in the module's order; tied ones under each name."""
        ...

    def whole(self, name: str) -> Tensor:
        """Return one tensor with its full shape, without a gradient.

        This may be a collective operation: every rank calls it for the same names in the same order.
        """
        ...

    def local(self, name: str) -> Tensor:
        """Return the part of a tensor that this rank holds, without a gradient; no other rank is asked."""
        ...

    def empty(self, name: str) -> Tensor:
        """Return one tensor with its full shape and its dtype, on the device "meta"; no other rank is asked."""
        ...


class ModuleWeights:
    """The weights of a module: whole on every rank, or spread over ranks.

    Tensors share the module's memory, but for those that are gathered from several ranks.

    Args:
        module: read anew at each call, so that replaced parameters are seen.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def names(self) -> tuple[str, ...]:
        """Return the names of the module's state dict."""
        return tuple(self._module.state_dict())

    def whole(self, name: str) -> Tensor:
        """Return a parameter or buffer, without a gradient."""
        return gathered(self._tensor(name))

    def local(self, name: str) -> Tensor:
        """Return what this rank holds of a parameter or buffer."""
        return held(self._tensor(name)).detach()

    def empty(self, name: str) -> Tensor:
        """Return a parameter or buffer without numbers."""
        tensor = self._tensor(name)
        return torch.empty(whole_shape(tensor), dtype=tensor.dtype, device="meta")

    def _tensor(self, name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        tensor: Tensor = getattr(self._module.get_submodule(path), leaf)
        return rounded(tensor) if is_exact(tensor) else tensor


class WeightsInside:
    """The weights of a module inside the module of another view.

    Args:
        outer: the view of the module around it.
        path: name of the inner module there; empty for the outer module itself.
    """

    def __init__(self, outer: WeightView, path: str) -> None:
        self._outer = outer
        self._prefix = f"{path}." if path else ""

    def names(self) -> tuple[str, ...]:
        """Return the names as the inner module has them."""
        return tuple(name.removeprefix(self._prefix) for name in self._outer.names() if name.startswith(self._prefix))

    def whole(self, name: str) -> Tensor:
        """Return one tensor with its full shape; see `WeightView.whole`."""
        return self._outer.whole(self._prefix + name)

    def local(self, name: str) -> Tensor:
        """Return this rank's part of a tensor."""
        return self._outer.local(self._prefix + name)

    def empty(self, name: str) -> Tensor:
        """Return one tensor without numbers."""
        return self._outer.empty(self._prefix + name)


class HeldWeights:
    """Whole tensors that were read from another view, which may be read again without any other rank.

    Args:
        tensors: by the names of the other view.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> tuple[str, ...]:
        """Return the names of the tensors that were read, in the order in which they were read."""
        return tuple(self._tensors)

    def whole(self, name: str) -> Tensor:
        """Return a tensor that was read."""
        return self._tensors[name]

    def local(self, name: str) -> Tensor:
        """Return what `whole` returns."""
        return self.whole(name)

    def empty(self, name: str) -> Tensor:
        """Return a tensor without its numbers."""
        return self.whole(name).to("meta")


def view_of(module: nn.Module) -> WeightView:
    """Return the view of a module's weights."""
    return ModuleWeights(module)


def shapes_of(weights: WeightView) -> WeightView:
    """Return a view of the same weights without numbers, which one rank reads without any other."""
    return HeldWeights({name: weights.empty(name) for name in weights.names()})


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of a module's parameters, in its order; of tied ones the first name alone."""
    return tuple(name for name, _ in module.named_parameters())


def whole_tensors(weights: WeightView, names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor), one at a time, so that no more than one need be gathered at once.

    Args:
        names: default: all of the view.
    """
    for name in weights.names() if names is None else names:
        yield name, weights.whole(name)


def whole_parameters(module: nn.Module, weights: WeightView | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, whole tensor) of a module's parameters; tied ones once.

    Args:
        weights: view of `module`; default: `view_of` it.
    """
    return whole_tensors(weights or view_of(module), parameter_names(module))


@torch.no_grad()
def whole_module(module: nn.Module, weights: WeightView) -> nn.Module:
    """Return a copy of a module that holds whole tensors, frozen; what is whole in the module itself is shared.

    Args:
        weights: view of `module`.
    """
    twin = copy.copy(module)
    twin._parameters = {
        name: None if parameter is None else nn.Parameter(weights.whole(name), requires_grad=False)
        for name, parameter in module._parameters.items()
    }
    held_back = module._non_persistent_buffers_set  # no view has them: they are constants, and whole
    twin._buffers = {
        name: buffer if buffer is None or name in held_back else weights.whole(name)
        for name, buffer in module._buffers.items()
    }
    twin._modules = {
        name: None if child is None else whole_module(child, WeightsInside(weights, name))
        for name, child in module._modules.items()
    }
    return twin
