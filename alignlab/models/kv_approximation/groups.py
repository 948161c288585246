"""Keys and values in 4-bit integers, keys a channel over groups of tokens, values a token; the newest tokens exact.

Positions are divided into groups of G tokens. A query at position i meets the rounded key and value at position j where

    floor(j / G) < floor(i / G) - recent

and the exact ones otherwise: its own group, which may be incomplete, and the `recent` groups before it. So a group is
complete, and its rounding known, before anything reads it rounded.

Reference: Liu et al. (2024), KIVI, arXiv:2402.02750, Section 4.

Shapes: M groups, G tokens of a group, N tokens, H heads, K kv heads, D size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.kv_approximation.group_plan import plan_groups
from alignlab.models.kv_approximation.record import Parities, parities_of, with_parity
from alignlab.models.kv_approximation.straight_through import straight_through
from alignlab.models.packed_attention import block_attention, in_autocast_dtype
from alignlab.models.sink_window import Window
from alignlab.types import Segments

_LARGEST = 15


class Int4(NamedTuple):
    """Numbers in 4 bits each.

    Attributes:
        codes: [..., D / 2] uint8; the first half of a vector in the low bits, the second half in the high ones.
        scales, lows: what a step of a code is worth, and what code 0 is, of a shape that broadcasts to [..., D].
    """

    codes: Tensor
    scales: Tensor
    lows: Tensor


def to_int4(x: Tensor, over: int, parities: Parities | None = None) -> Int4:
    """Round numbers to 4 bits, with a scale and a lowest number for all that lie along one dimension.

        scale = (max x - min x) / 15,  code = round((x - min x) / scale)

    Args:
        x: [..., D], D even, of a floating dtype.
        over: the dimension; scales and lows have size 1 in it.
        parities: of the codes to take; None takes the nearest ones.

    Reference: arXiv:2402.02750, Eq. 1.
    """
    exact = torch.promote_types(x.dtype, torch.float32)
    lows = x.amin(over, keepdim=True)
    spread = x.amax(over, keepdim=True).to(exact) - lows.to(exact)
    scales = (spread / _LARGEST).to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)
    numbers = (x.to(exact) - lows.to(exact)) / scales.to(exact)
    nearest = numbers.round().clamp_(0, _LARGEST)
    codes = with_parity(nearest.to(torch.int16), numbers >= nearest, parities, 0, _LARGEST).to(torch.uint8)
    low_half, high_half = codes.chunk(2, dim=-1)
    return Int4(low_half | (high_half << 4), scales, lows)


def from_int4(rounded: Int4, out: Tensor) -> Tensor:
    """Write code * scale + low into `out` [..., D], and return it."""
    low_half, high_half = out.chunk(2, dim=-1)
    low_half.copy_(rounded.codes & _LARGEST)
    high_half.copy_(rounded.codes >> 4)
    return out.mul_(rounded.scales).add_(rounded.lows)


@dataclass(frozen=True)
class GroupedRounding:
    """See the top of this module.

    Attributes:
        group: tokens of a group, G.
        recent: groups before a query's own that it meets exactly.
    """

    group: int
    recent: int

    @property
    def exact_window(self) -> int:
        """Tokens that a query may meet exactly, itself included, counted from the last of them that it always does."""
        return self.recent * self.group + 1

    def rounds_window(self, window: int | None) -> bool:
        """Return whether any token in a layer's window is old enough to be rounded."""
        return window is None or window > self.exact_window

    def windows(self, spec: LayerCacheSpec) -> tuple[Window, ...]:
        """Return the windows of the rounded and of the exact tokens of a layer; one where none is rounded."""
        return (spec.window, self.exact_window) if self.rounds_window(spec.window) else (spec.window,)

    def keys(self, groups: Tensor, parities: Parities | None = None) -> Int4:
        """Return rounded keys of whole groups [M,G,K,D]; scales and lows [M,1,K,D]."""
        return to_int4(groups, 1, parities)

    def values(self, groups: Tensor, parities: Parities | None = None) -> Int4:
        """Return rounded values of whole groups [M,G,K,D]; scales and lows [M,G,K,1]."""
        return to_int4(groups, 3, parities)

    def block_bytes(self, spec: LayerCacheSpec, dtype: torch.dtype, block_size: int) -> dict[Window, int]:
        """Return the bytes of a block of a layer's tokens, by window, in a model of a dtype."""
        exact = block_size * dtype.itemsize * spec.token_numel
        if not self.rounds_window(spec.window):
            return {spec.window: exact}
        (heads, key_size), (_, value_size) = spec.per_token["key"], spec.per_token["value"]
        codes = block_size * heads * (key_size + value_size) // 2
        scales = 2 * heads * (block_size // self.group * key_size + block_size)
        return {spec.window: codes + dtype.itemsize * scales, self.exact_window: exact}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, record: Tensor | None = None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:
        """Return packed attention to old keys and values rounded, and new ones exact; see `KVApproximation`."""
        query, key, value = in_autocast_dtype(query, key, value)
        plan = plan_groups(segments, sliding_window, self.group, self.recent)
        members = plan.members.flatten()
        old_keys, old_values = (x.index_select(2, members) for x in (key, value))
        of_keys = of_values = None
        if record is not None:
            parities = parities_of(record.index_select(0, members), old_keys, old_values)
            of_keys, of_values = (Parities(*(_groups(part, self.group) for part in of)) for of in parities)
        keys = self.keys(_groups(old_keys.detach(), self.group), of_keys)
        values = self.values(_groups(old_values.detach(), self.group), of_values)
        rounded_keys = straight_through(old_keys, _flat(keys, old_keys))
        rounded_values = straight_through(old_values, _flat(values, old_values))
        return block_attention(
            query, torch.cat((key, rounded_keys), 2), torch.cat((value, rounded_values), 2), plan.blocks,
            scaling=scaling, softcap=softcap, sinks=sinks,
        )


def _groups(x: Tensor, size: int) -> Tensor:
    """[1,K,M*G,D] -> [M,G,K,D]."""
    return x[0].unflatten(1, (-1, size)).permute(1, 2, 0, 3)


def _flat(rounded: Int4, like: Tensor) -> Tensor:
    """Rounded [M,G,K,D] -> [1,K,M*G,D]."""
    count, group, heads, half = rounded.codes.shape
    numbers = from_int4(rounded, like.new_empty(count, group, heads, 2 * half))
    return numbers.permute(2, 0, 1, 3).flatten(1, 2)[None]
