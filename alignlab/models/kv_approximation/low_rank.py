"""Keys and values in few dimensions: those in which the keys, or values, of calibration tokens are largest.

With U the first r right singular vectors of a head's calibration keys before their rotation, and R_p the rotation of
position p,

    c = U R_p^T k  (r numbers, which are kept),    k' = R_p U^T c

and likewise for values, without rotation. All tokens are met so, the present one included. The map is linear, and its
gradient is its own: the part of a gradient that lies in the dimensions that are kept.

References: Saxena et al. (2024), Eigen Attention, arXiv:2408.05646, Section 3; Chang et al. (2024), PALU,
arXiv:2407.21118, Section 3.

Shapes: N tokens, K kv heads, D size of a head, r dimensions that are kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.kv_approximation.low_rank_bases import LowRankBases
from alignlab.models.kv_approximation.protocol import KVApproximation
from alignlab.models.kv_approximation.rotations import KeyRotation
from alignlab.models.packed_attention import in_autocast_dtype, packed_attention
from alignlab.models.sink_window import Window
from alignlab.types import Segments


@dataclass(frozen=True, eq=False)
class LowRank:
    """Keys and values of every layer in few dimensions, by bases that are measured once.

    Attributes:
        bases: of all layers.
        layer_idx: the layer that `attend` computes; None in what stands for all layers.
    """

    bases: LowRankBases
    layer_idx: int | None = None

    def of_layer(self, layer_idx: int) -> KVApproximation:
        """Return the approximation of one layer."""
        return LowRank(self.bases, layer_idx)

    def windows(self, spec: LayerCacheSpec) -> tuple[Window, ...]:
        """Return the window of a layer's tokens."""
        return (spec.window,)

    def block_bytes(self, spec: LayerCacheSpec, dtype: torch.dtype, block_size: int) -> dict[Window, int]:
        """Return the bytes of a block of a layer's tokens, by window; whole heads until the bases are measured."""
        kept = sum(heads * self.bases.rank_of(name, size) for name, (heads, size) in spec.per_token.items())
        return {spec.window: block_size * dtype.itemsize * kept}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, record: Tensor | None = None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:
        """Return packed attention to the keys and values that few dimensions hold; see `KVApproximation`."""
        assert self.layer_idx is not None
        query, key, value = in_autocast_dtype(query, key, value)
        positions = segments.position_ids[:, None]
        kept = {}
        for name, entries in (("key", key), ("value", value)):
            coefficients = self.encode(self.layer_idx, name, entries[0].transpose(0, 1), positions)
            kept[name] = self.decode(self.layer_idx, name, coefficients, positions).transpose(0, 1)[None]
        return packed_attention(
            query, kept["key"], kept["value"], segments, scaling=scaling, sliding_window=sliding_window,
            softcap=softcap, sinks=sinks,
        )

    def encode(self, layer_idx: int, name: str, entries: Tensor, positions: Tensor) -> Tensor:
        """Return the numbers [..., K, r] that are kept of keys or values [..., K, D], in their dtype.

        Args:
            name: "key", positions applied, or "value".
            positions: [..., 1] or of a shape that broadcasts to it.
        """
        exact = torch.promote_types(entries.dtype, torch.float32)
        turned = self._rotation(layer_idx, name).rotate(entries.to(exact), positions, back=True)
        basis = self.bases.basis(layer_idx, name, entries.device).to(exact)  # [K,r,D]
        return torch.einsum("...kd,krd->...kr", turned, basis).to(entries.dtype)

    def decode(self, layer_idx: int, name: str, kept: Tensor, positions: Tensor) -> Tensor:
        """Return keys or values [..., K, D] of the numbers that were kept [..., K, r]; see `encode`."""
        exact = torch.promote_types(kept.dtype, torch.float32)
        basis = self.bases.basis(layer_idx, name, kept.device).to(exact)
        turned = torch.einsum("...kr,krd->...kd", kept.to(exact), basis)
        return self._rotation(layer_idx, name).rotate(turned, positions).to(kept.dtype)

    def _rotation(self, layer_idx: int, name: str) -> KeyRotation:
        return self.bases.rotations[layer_idx] if name == "key" else KeyRotation(None)
