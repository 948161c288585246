"""The code that the engine took, of two neighbours: one bit a number, recorded with the completion for the trainer.

Rounding is a step. Engine and trainer compute the same key with other roundings of their own, 1e-7 apart, and where the
middle between two codes lies between them they would take different codes. A layer magnifies that: a distance d becomes
about sqrt(d * step), so that after few layers the two would be as far apart as if the trainer did not round at all. So
the engine records the parity of each code, and the trainer takes the neighbour that has it.

A record is [N, L, bytes] uint8 for L layers. Of a layer, byte 0 is 1 if the token has a record there; the bits of its
key follow, then those of its value, each filled up to whole bytes.

Shapes: N tokens, K kv heads, D size of a key's head, V size of a value's head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_BITS = 8


class Parities(NamedTuple):
    """Parities that a pass takes over.

    Attributes:
        bits: [..., D] uint8, 0 or 1, of each code.
        known: [..., 1] bool, whether there is a record of the vector.
    """

    bits: Tensor
    known: Tensor


def num_bytes(size: int) -> int:
    """Return the bytes of `size` bits."""
    return -(-size // _BITS)


def packed_bits(bits: Tensor) -> Tensor:
    """Return bits [N, size] of 0 and 1 in bytes [N, bytes] uint8, the first one lowest."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % _BITS))
    weights = 1 << torch.arange(_BITS, dtype=torch.uint8, device=bits.device)
    return (padded.unflatten(1, (-1, _BITS)) * weights).sum(-1, dtype=torch.uint8)


def unpacked_bits(packed: Tensor, size: int) -> Tensor:
    """Return the first `size` bits of bytes [N, bytes], [N, size] uint8."""
    places = torch.arange(_BITS, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> places) & 1).flatten(1)[:, :size]


def record_of_layers(parities: Mapping[int, tuple[Tensor, Tensor, Tensor]], num_layers: int) -> Tensor:
    """Return the record [N, L, bytes] of tokens.

    Args:
        parities: by layer, bits of the keys [N, K * D] and of the values [N, K * V], and whether they are known [N].
        num_layers: L.
    """
    rows = {
        layer: torch.cat((known[:, None].to(torch.uint8), packed_bits(keys), packed_bits(values)), dim=1)
        for layer, (keys, values, known) in parities.items()
    }
    first = next(iter(rows.values()))
    record = first.new_zeros(len(first), num_layers, max(row.shape[1] for row in rows.values()))
    for layer, row in rows.items():
        record[:, layer, : row.shape[1]] = row
    return record


def parities_of(record: Tensor, key: Tensor, value: Tensor) -> tuple[Parities, Parities]:
    """Return the parities of keys [1,K,N,D] and values [1,K,N,V], in their layout, from a layer's record [N, bytes]."""
    first, result = 1, []
    known = (record[:, 0] == 1)[None, None, :, None]
    for x in (key, value):
        heads, size = x.shape[1], x.shape[3]
        end = first + num_bytes(heads * size)
        bits = unpacked_bits(record[:, first:end], heads * size).unflatten(1, (heads, size))
        result.append(Parities(bits.transpose(0, 1)[None], known))
        first = end
    return result[0], result[1]


def with_parity(codes: Tensor, is_above: Tensor, parities: Parities | None, lowest: int, highest: int) -> Tensor:
    """Return codes of the parity that was recorded: for one of the other parity, the neighbour beyond the number.

    Args:
        codes: [..., D] of a signed whole dtype, each the nearest to its number.
        is_above: whether the number is at least what its code stands for.
        parities: None leaves all codes.
        lowest, highest: of all codes.
    """
    if parities is None:
        return codes
    is_other = parities.known & ((codes & 1) != parities.bits)
    neighbours = (codes + torch.where(is_above, 1, -1).to(codes.dtype)).clamp_(lowest, highest)
    return torch.where(is_other, neighbours, codes)
