"""Keys and values rounded to 8 bits, with one scale a token and head.

Shapes: N tokens, H heads, K kv heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.kv_approximation.record import Parities, parities_of, with_parity
from alignlab.models.kv_approximation.straight_through import straight_through
from alignlab.models.packed_attention import in_autocast_dtype, packed_attention
from alignlab.models.sink_window import Window
from alignlab.types import Segments

_LARGEST_INT8 = 127
_LARGEST_E4M3 = 448.0


def scales_of(x: Tensor, largest: float) -> Tensor:
    """Return the scale [...] of each vector [..., D] under which its largest number becomes `largest`, in its dtype.

    Never 0, so that a vector of zeros can be divided by its scale.
    """
    peak = x.abs().amax(-1).to(torch.promote_types(x.dtype, torch.float32))
    return (peak / largest).to(x.dtype).clamp_min(torch.finfo(x.dtype).tiny)


def _scaled(x: Tensor, scales: Tensor, largest: float) -> Tensor:
    """Return x [..., D] over its scales [...], within the largest numbers; at least in float32."""
    exact = torch.promote_types(x.dtype, torch.float32)
    return (x.to(exact) / scales.to(exact)[..., None]).clamp_(-largest, largest)


def to_int8(x: Tensor, parities: Parities | None = None) -> tuple[Tensor, Tensor]:
    """Round vectors to integers from -127 to 127 and a scale each.

        scale = max |x| / 127,  code = round(x / scale)

    Args:
        x: [..., D], of a floating dtype.
        parities: of the codes to take; None takes the nearest ones.

    Returns:
        Codes [..., D] int8, and scales [...] in the dtype of x. An error is at most scale / 2 in float32.

    Reference: Dettmers et al. (2022), arXiv:2208.07339, Eq. 1, with one scale a vector.
    """
    scales = scales_of(x, _LARGEST_INT8)
    numbers = _scaled(x, scales, _LARGEST_INT8)
    codes = numbers.round()
    is_above = numbers >= codes
    return with_parity(codes.to(torch.int8), is_above, parities, -_LARGEST_INT8, _LARGEST_INT8), scales


def from_int8(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Write code * scale of codes [..., D] and scales [...] into `out` [..., D], and return it."""
    return out.copy_(codes).mul_(scales[..., None])


def to_float8(x: Tensor, parities: Parities | None = None) -> tuple[Tensor, Tensor]:
    """Round vectors to 8-bit floating numbers of 4 exponent and 3 mantissa bits (e4m3), and a scale each.

        scale = max |x| / 448,  code = e4m3(x / scale)

    Args:
        x: [..., D], of a floating dtype.
        parities: of the codes to take; None takes the nearest ones.

    Returns:
        Codes [..., D] uint8, the bits of the numbers, and scales [...] in the dtype of x. The relative error is at most
        1/16 of numbers above 2^-6 * scale.

    Reference: Micikevicius et al. (2022), arXiv:2209.05433.
    """
    scales = scales_of(x, _LARGEST_E4M3)
    numbers = _scaled(x, scales, _LARGEST_E4M3)
    nearest = numbers.to(torch.float8_e4m3fn)
    codes = nearest.view(torch.uint8)
    if parities is not None:  # without their sign, codes are in the order of what they stand for
        is_above = numbers.abs() >= nearest.to(numbers.dtype).abs()
        sizes = with_parity((codes & 0x7F).to(torch.int16), is_above, parities, 0, 0x7E)
        codes = sizes.to(torch.uint8) | (codes & 0x80)
    return codes, scales


def from_float8(codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
    """Write e4m3(code) * scale of codes [..., D] and scales [...] into `out` [..., D], and return it.

    On a CPU by a table of the 256 numbers, which is four times as fast as torch's conversion.
    """
    if codes.device.type == "cpu":
        torch.index_select(_e4m3_numbers(out.dtype), 0, codes.reshape(-1).int(), out=out.view(-1))
    else:
        out.copy_(codes.view(torch.float8_e4m3fn))
    return out.mul_(scales[..., None])


@cache
def _e4m3_numbers(dtype: torch.dtype) -> Tensor:
    """Return the 256 numbers of e4m3 by their bits, on the CPU."""
    with torch.inference_mode(False):
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).to(dtype)


@dataclass(frozen=True)
class Rounding:
    """Keys, after their rotation, and values rounded a token and head, as soon as they are known.

    Attributes:
        bits: "int8" or "fp8".
    """

    bits: str

    def encode(self, x: Tensor, parities: Parities | None = None) -> tuple[Tensor, Tensor]:
        """Return codes [..., D] of one byte and scales [...] of vectors [..., D]; of recorded parities, if any."""
        return to_int8(x, parities) if self.bits == "int8" else to_float8(x, parities)

    def decode(self, codes: Tensor, scales: Tensor, out: Tensor) -> Tensor:
        """Write the rounded vectors of codes and scales into `out` [..., D], and return it."""
        return from_int8(codes, scales, out) if self.bits == "int8" else from_float8(codes, scales, out)

    def rounded(self, x: Tensor, parities: Parities | None = None) -> Tensor:
        """Return the rounded vectors [..., D], with the gradient of x itself."""
        codes, scales = self.encode(x.detach(), parities)
        return straight_through(x, self.decode(codes, scales, torch.empty(x.shape, dtype=x.dtype, device=x.device)))

    def windows(self, spec: LayerCacheSpec) -> tuple[Window, ...]:
        """Return the window of a layer's tokens."""
        return (spec.window,)

    def block_bytes(self, spec: LayerCacheSpec, dtype: torch.dtype, block_size: int) -> dict[Window, int]:
        """Return the bytes of a block of a layer's tokens, by window, in a model of a dtype."""
        kept = sum(num_heads * (size + dtype.itemsize) for num_heads, size in spec.per_token.values())
        return {spec.window: block_size * kept}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, segments: Segments, record: Tensor | None = None,
        *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None,
    ) -> Tensor:
        """Return packed attention to rounded keys and values; see `KVApproximation`."""
        query, key, value = in_autocast_dtype(query, key, value)
        of_keys, of_values = (None, None) if record is None else parities_of(record, key, value)
        return packed_attention(
            query, self.rounded(key, of_keys), self.rounded(value, of_values), segments, scaling=scaling,
            sliding_window=sliding_window, softcap=softcap, sinks=sinks,
        )
