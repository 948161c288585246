"""Random numbers by key and position alone, so that a token is drawn alike in any batch and after any resumption.

Shapes: B rows, each the next token of a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

_INCREMENT, _MIX_1, _MIX_2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def row_keys(keys: Tensor, positions: Tensor) -> Tensor:
    """Return a key of random numbers for each token of a completion, by SplitMix64.

    Args:
        keys: [B] int64, keys of the completions.
        positions: [B] int64, number of the token in its completion.

    Returns:
        [B] int64.

    Reference: Steele, Lea, Flood (2014), "Fast splittable pseudorandom number generators".
    """
    state = keys + (positions + 1) * _INCREMENT
    state = (state ^ _shift_right(state, 30)) * _MIX_1
    state = (state ^ _shift_right(state, 27)) * _MIX_2
    return state ^ _shift_right(state, 31)


def exponentials(keys: Tensor, first: int, count: int) -> Tensor:
    """Return `count` exponentially distributed numbers for each key, from number `first` of its stream on.

    Args:
        keys: [B] int64.

    Returns:
        [B, count] float64, > 0.
    """
    numbers = torch.arange(first, first + count, device=keys.device)
    uniform = (_shift_right(row_keys(keys[:, None], numbers), 12).double() + 0.5) * 2.0**-52  # within (0, 1)
    return -torch.log1p(-uniform)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Return a logical shift; torch's own shift copies the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
