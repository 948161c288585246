"""Packs without anything to train on: ranks whose weights are spread gather them together, pack by pack.

A rank that has fewer packs than another computes empty ones in addition. Their losses are empty sums, whose gradients
are zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from alignlab.loop.ranks import Ranks
from alignlab.types import Experience, Segments

_OF_STEP = frozenset({"pair_margins", "pair_probabilities", "desirable"})
_LENGTH = 2
"""Tokens of an empty pack; one would be a layout of its own for the attention kernels."""


def filled_up(packs: Sequence[Experience], ranks: Ranks) -> list[Experience]:
    """Return the packs, and as many empty ones as make their number that of the rank with the most.

    Every rank calls this together. A rank without any pack computes empty ones that have no fields but those that every
    pack has.
    """
    missing = ranks.largest(len(packs)) - len(packs)
    if missing == 0:
        return list(packs)
    return [*packs, *[empty_like(packs[-1]) if packs else _blank(ranks.device)] * missing]


def empty_like(pack: Experience) -> Experience:
    """Return a pack of two tokens that belong to no sequence, none of them trained, with the fields of another pack."""
    values = {f.name: value for f in fields(pack) if isinstance(value := getattr(pack, f.name), Tensor)}
    emptied = {name: _emptied(name, value, pack.num_tokens) for name, value in values.items()}
    segments = Segments((_LENGTH,), (-1,), (-1,), (0,), pack.segments.device)
    return replace(pack, segments=segments, **emptied)


def _blank(device: torch.device) -> Experience:
    tokens = torch.zeros(_LENGTH, dtype=torch.long, device=device)
    return Experience(tokens, Segments((_LENGTH,), (-1,), (-1,), (0,), device), tokens.bool())


def _emptied(name: str, value: Tensor, num_tokens: int) -> Tensor:
    """Return a field for an empty pack: what is of the step stays, what is of tokens becomes two zeros, what is of
    masked tokens nothing."""
    if name in _OF_STEP:
        return value
    if len(value) != num_tokens:  # of masked tokens, which are fewer
        return value[:0]
    empty = value.new_zeros(_LENGTH, *value.shape[1:])
    return empty.fill_(-1) if name == "routing" else empty  # -1: no record to replay
