"""The keys that a query chose: a count and a fingerprint of each row, recorded with the completion for the trainer.

A choice is a step. Engine and trainer compute the same score with other roundings of their own, and where two keys at
the edge of a choice lie that near, they would choose differently. The engine records how many keys a row chose beside
the recent ones, and a fingerprint of their positions. The trainer chooses for itself; where that differs, it looks for
the set with that count and fingerprint among those that exchange the `_NEAR` keys on each side of the edge, and keeps
its own choice where none has them (as after larger changes of the weights).

A record is [N, L, bytes] uint8 for L layers. Of a layer, byte 0 is 1 if the token has a record there; then, for each
head, two bytes of the count and two of the fingerprint. A larger count than 65534 is not recorded.

Shapes: N tokens, H heads, K kv heads, G heads that share one; [..., S] rows over S keys.
"""

from __future__ import annotations

from functools import cache
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from alignlab.transfer import to_device

_NEAR = 3
_UNKNOWN = 2**16 - 1
_MASK = 2**16 - 1


class Choices(NamedTuple):
    """Recorded choices of rows.

    Attributes:
        counts: int64, -1 without a record.
        fingerprints: int64, likewise.
    """

    counts: Tensor
    fingerprints: Tensor

    def of_queries(self, queries: Tensor, num_kv: int) -> Choices:
        """Return the choices [K,b,M,G] of queries [b,M] of those [N,H]; N itself, the padding, has none."""
        rows = []
        for numbers in self:
            padded = torch.cat((numbers, numbers.new_full((1, numbers.shape[1]), -1)))
            rows.append(padded[queries].unflatten(-1, (num_kv, -1)).permute(2, 0, 1, 3))
        return Choices(*rows)


def fingerprint(chosen: Tensor, positions: Tensor) -> Tensor:
    """Return a number from 0 to 65535 of each set of positions, [...] int64.

    Args:
        chosen: [..., S] bool.
        positions: [..., S], of the keys; broadcasts.
    """
    return (_hash(positions) * chosen).sum(-1) & _MASK


def _hash(positions: Tensor) -> Tensor:
    """Return 16 bits of each position, int64, such that exchanged pairs of positions have other sums."""
    x = (positions.long() + 1) * 0x9E3B & 0x7FFFFFFF
    x = (x ^ (x >> 15)) * 0x2C1B3C6D & 0x7FFFFFFFFFFFFFFF
    x = (x ^ (x >> 12)) * 0x297A2D39 & 0x7FFFFFFFFFFFFFFF
    return (x ^ (x >> 15)) & _MASK


def packed_choices(chosen: Tensor, positions: Tensor) -> Tensor:
    """Return the count and the fingerprint of each row in one number, [...] int32."""
    counts = chosen.sum(-1).clamp_max(_UNKNOWN)
    return (counts | (fingerprint(chosen, positions) << 16)).to(torch.int32)


def choices_of(record: Tensor, num_heads: int) -> Choices:
    """Return the choices [N,H] of a layer's record [N, bytes]."""
    # A copy, since one row counts as contiguous wherever it begins, and whole numbers begin at a multiple of 4.
    numbers = record[:, 1 : 1 + 4 * num_heads].clone(memory_format=torch.contiguous_format).view(torch.int32).long()
    counts = numbers & _MASK
    is_known = (record[:, :1] == 1) & (counts != _UNKNOWN)
    return Choices(*(x.masked_fill(~is_known, -1) for x in (counts, (numbers >> 16) & _MASK)))


def recorded_choice(chosen: Tensor, scores: Tensor, positions: Tensor, choices: Choices) -> Tensor:
    """Return choices [..., S] as they were recorded: where a row's own is another, a near set that has the record.

    Args:
        chosen: [..., S] bool, each row's own choice.
        scores: [..., S], -inf for what cannot be chosen.
        positions: [..., S], of the keys.
        choices: [...].
    """
    is_same = (chosen.sum(-1) == choices.counts) & (fingerprint(chosen, positions) == choices.fingerprints)
    differs = ~is_same & (choices.counts >= 0)
    if chosen.device.type != "cpu":  # the host would wait for the number of rows that differ
        of_all = Choices(*(numbers.flatten() for numbers in choices))
        near = _near_choice(chosen.flatten(0, -2), scores.flatten(0, -2), positions.flatten(0, -2), of_all)
        return torch.where(differs[..., None], near.view(chosen.shape), chosen)
    rows = differs.nonzero(as_tuple=True)
    if not len(rows[0]):
        return chosen
    of_rows = Choices(choices.counts[rows], choices.fingerprints[rows])
    result = chosen.clone()
    result[rows] = _near_choice(chosen[rows], scores[rows], positions[rows], of_rows)
    return result


def _near_choice(chosen: Tensor, scores: Tensor, positions: Tensor, choices: Choices) -> Tensor:
    """Return the near choices of rows [R,S] that have the record, and the rows' own without one."""
    ranked, order = scores.sort(dim=-1, descending=True)
    ranks = torch.arange(scores.shape[1], device=scores.device)
    edges = torch.arange(-_NEAR, _NEAR, device=scores.device) + choices.counts[:, None]  # ranks near the edge [R,2n]
    base = (ranks < edges[:, :1]) & (ranked > -torch.inf)
    places = edges.clamp(0, scores.shape[1] - 1)
    is_missing = (edges < 0) | (edges >= scores.shape[1]) | (ranked.gather(1, places) == -torch.inf)
    hashes = _hash(positions.gather(1, order))
    near = hashes.gather(1, places).masked_fill(is_missing, 0)  # [R,2n]
    sets = _sets(scores.device)  # [C,2n]
    is_last = edges >= choices.counts[:, None]
    impossible = (sets & (is_missing & is_last)[:, None]) | (~sets & (is_missing & ~is_last)[:, None])
    sums = ((hashes * base).sum(1, keepdim=True) + (near[:, None] * sets).sum(-1)) & _MASK  # [R,C]
    matches = (sums == choices.fingerprints[:, None]) & ~impossible.any(-1)
    best = matches.int().argmax(1)  # the first one: the nearest to the row's own ranks
    marks = torch.zeros_like(base, dtype=torch.int32)
    marks.scatter_add_(1, places, (sets[best] & ~is_missing).int())
    result = torch.zeros_like(chosen).scatter_(1, order, base | (marks > 0))
    return torch.where(matches.any(1, keepdim=True), result, chosen)


@cache
def _sets(device: torch.device) -> Tensor:
    """Return the sets of half of the keys at an edge, [C,2n] bool, those of the best ranks first."""
    sets = sorted(combinations(range(2 * _NEAR), _NEAR), key=sum)
    chosen = torch.zeros(len(sets), 2 * _NEAR, dtype=torch.bool)
    for row, members in enumerate(sets):
        chosen[row, list(members)] = True
    return to_device([chosen], device)[0]
