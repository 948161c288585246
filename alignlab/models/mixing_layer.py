"""The base of all layers that mix the tokens of a sequence: what a decoder layer and the engine ask of each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from torch import nn

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.config import PolicyConfig


class MixingLayer(nn.Module, ABC):
    """Attention, or a layer that keeps a state of each sequence.

    A kind is a subclass in a file of its own, named in `attention_kinds.ATTENTION_KINDS`. A config names a kind for
    each layer (`layer_types`), so that one model may mix them.

    Attributes:
        has_window: layers of this kind see the last `config.sliding_window` tokens alone.
        routes: layers of this kind have a router, and are given the pass's `RoutingRecord` as `routing`.
        layer_idx: number of the layer, by which caches keep what it computes; where layers share their weights, that of
            the layer in computation.
        name_in_layer: name of the module in its decoder layer, as Hub checkpoints have it.
        rotary_size: numbers of a head that are rotated by positions; None in a layer without positions.
        local_rope: the layer rotates by `config.rope_local_base_freq`.
    """

    has_window: ClassVar[bool] = False
    routes: ClassVar[bool] = False
    name_in_layer: ClassVar[str] = "self_attn"
    rotary_size: int | None
    local_rope: bool = False

    def __init__(self, config: PolicyConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx

    @property
    def rotation_key(self) -> str | None:
        """Name of the rotation that the layer shares with those that rotate alike; None in a layer without positions.
        """
        if self.rotary_size is None:
            return None
        return f"{self.rotary_size}_local" if self.local_rope else str(self.rotary_size)

    @classmethod
    @abstractmethod
    def check_config(cls, config: PolicyConfig) -> None:
        """Raise if a config cannot have layers of this kind.

        Raises:
            ConfigError: with the field, its value, and what to change.
        """

    @classmethod
    @abstractmethod
    def make_mask(cls, config: PolicyConfig, **arguments: Any) -> Any:
        """Return the mask of an ordinary padded batch, from the arguments of `transformers`' `create_causal_mask`."""

    @abstractmethod
    def cache_spec(self) -> LayerCacheSpec:
        """Return what the layer keeps of each token, or of each sequence."""

    def initialize(self) -> None:
        """Draw the parameters that are no matrices; those of the layer's own modules are drawn elsewhere."""
