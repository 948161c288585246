"""The entries that each layer keeps of earlier tokens, or of a sequence: the engine's cache allocates by them.

A layer says what it keeps. A layer with keys and values keeps two tensors of each token, one with latent attention one
of each token, and a recurrent layer a state of each sequence, whatever its length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import causal_lm, hidden_states
from alignlab.models.evaluation_mode import evaluation_mode


@dataclass(frozen=True)
class LayerCacheSpec:
    """Tensors that one layer caches, by name, with the shape of a single entry.

    Attributes:
        per_token: one entry for each token, such as key [K, D] and value [K, D].
        per_sequence: one entry for each sequence, such as a recurrent state [H, K, V].
        float32_entries: names of those of `per_sequence` that are at least float32 whatever the model's dtype.
        window: tokens that a later token reads, itself included; None reads all. Entries of earlier tokens may go.
        value_columns: of a layer that keeps one "latent" [1, D] of each token: it is the key, and its first
            `value_columns` numbers are the value. None for a layer that keeps a "key" and a "value".
        query_heads: heads of a query that attends to what is kept, H; 0 where it is not known.
    """

    per_token: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    per_sequence: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    float32_entries: frozenset[str] = frozenset()
    window: int | None = None
    value_columns: int | None = None
    query_heads: int = field(default=0, compare=False)

    @classmethod
    def of_heads(
        cls, num_heads: int, key_dim: int, value_dim: int, *, window: int | None = None, query_heads: int = 0
    ) -> LayerCacheSpec:
        """Return the spec of a layer that keeps a key and a value of each token, under "key" and "value".

        Args:
            num_heads: kv heads, K.
            key_dim, value_dim: size of each head, D.
            query_heads: heads of a query, H.
        """
        shapes = {"key": (num_heads, key_dim), "value": (num_heads, value_dim)}
        return cls(shapes, window=window, query_heads=query_heads)

    @classmethod
    def of_latent(cls, size: int, value_columns: int, *, window: int | None = None) -> LayerCacheSpec:
        """Return the spec of a layer that keeps `size` numbers of each token, the first of which are its value."""
        return cls({"latent": (1, size)}, window=window, value_columns=value_columns)

    def entries(self, key: Tensor, value: Tensor | None) -> dict[str, Tensor]:
        """Return what is kept by its names: key [N,K,D] and value [N,K,V], or a latent [N,1,D] without a value."""
        if self.value_columns is not None:
            return {"latent": key}
        assert value is not None
        return {"key": key, "value": value}

    def key_and_value(self, entries: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return keys [..., K, D] and values [..., K, V] of entries; those of a latent share its memory."""
        if self.value_columns is None:
            return entries["key"], entries["value"]
        latent = entries["latent"]
        return latent, latent[..., : self.value_columns]

    @property
    def key_size(self) -> int:
        """Size of a head of a key, D, of a layer that keeps keys and values."""
        return self.per_token["key"][-1]

    @property
    def token_numel(self) -> int:
        """Numbers kept of each token."""
        return sum(math.prod(shape) for shape in self.per_token.values())

    def sequence_entries(self, dtype: torch.dtype) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        """Yield name, shape and dtype of what is kept of each sequence, by a model of a dtype."""
        for name, shape in self.per_sequence.items():
            exact = torch.promote_types(dtype, torch.float32)
            yield name, shape, exact if name in self.float32_entries else dtype

    def sequence_bytes(self, dtype: torch.dtype) -> int:
        """Return the bytes kept of each sequence, beside those of its tokens, by a model of a dtype."""
        return sum(kept.itemsize * math.prod(shape) for _, shape, kept in self.sequence_entries(dtype))


@runtime_checkable
class Caching(Protocol):
    """A layer that says what it caches."""

    layer_idx: int

    def cache_spec(self) -> LayerCacheSpec:
        """Return what this layer keeps."""
        ...


def cache_specs(model: nn.Module) -> dict[int, LayerCacheSpec]:
    """Return the cache spec of every layer of a language model, by `layer_idx`, in order.

    Layers of our own models declare it. A model of `transformers` declares nothing, so one token is run through it, and
    the keys and values that its layers hand to the attention function are measured.

    Raises:
        ConfigError: the model's attention is not "alignlab", or its layers cannot be computed with a layout.
    """
    lm = causal_lm(model)
    specs = _declared(lm) or _measured(lm)
    return dict(sorted(specs.items()))


def _declared(lm: PreTrainedModel) -> dict[int, LayerCacheSpec]:
    """Return what layers declare; each that shares its weights with others has a cache of its own."""
    if not isinstance(lm.config, PolicyConfig) or lm.config.shared_layers is None:
        return {module.layer_idx: module.cache_spec() for module in lm.modules() if isinstance(module, Caching)}
    layers = lm.get_decoder().layers
    of_blocks = [next(m.cache_spec() for m in layer.modules() if isinstance(m, Caching)) for layer in layers]
    return {index: of_blocks[block] for index, block in enumerate(lm.config.layer_blocks)}


class _ShapeRecorder:
    """A paged layout that caches nothing and notes the shapes that it is given; for models that keep keys and values.
    """

    keeps_latents = False

    def __init__(self) -> None:
        self.specs: dict[int, LayerCacheSpec] = {}

    def attend(
        self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor | None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None = None,
    ) -> Tensor:
        """Note a layer's shapes. One token attends to itself alone, so the result is its value in every query head."""
        assert value is not None
        self.specs[layer_idx] = LayerCacheSpec.of_heads(
            key.shape[1], key.shape[3], value.shape[3], window=sliding_window, query_heads=query.shape[1]
        )
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


@torch.no_grad()
def _measured(lm: nn.Module) -> dict[int, LayerCacheSpec]:
    device = next(lm.parameters()).device
    recorder, token = _ShapeRecorder(), torch.zeros(1, dtype=torch.int64, device=device)
    with evaluation_mode(lm.modules()):
        hidden_states(lm, token, token, recorder)
    return recorder.specs
