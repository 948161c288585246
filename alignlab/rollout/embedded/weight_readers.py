"""Modules that read the weights of some of their layers, which an engine cannot replace by layers without a weight."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, runtime_checkable

from torch import nn


@runtime_checkable
class ReadsWeights(Protocol):
    """A module that reads the weights of some of its layers, beside their forward pass."""

    def layers_read_by_weight(self) -> list[nn.Module]:
        """Return these layers, or what is wrapped around them."""
        ...


def layers_read(modules: Iterable[nn.Module]) -> set[nn.Module]:
    """Return the layers, or what is wrapped around them, whose weights one of the modules reads."""
    readers = [module for module in modules if isinstance(module, ReadsWeights)]
    return {layer for reader in readers for layer in reader.layers_read_by_weight()}
