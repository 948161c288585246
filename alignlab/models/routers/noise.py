"""Random numbers of a token, from a counter instead of a generator: the same in whatever pack the token lies.

The numbers of a token depend on the router's key, which moves once an optimizer step, and on the token's group,
sequence, position and id. A prompt that completions share has one set of numbers. Activation checkpointing, another
micro-batch and another device see the same numbers.

Shapes: N tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from alignlab.models.routers.protocol import RoutedTokens
from alignlab.transfer import to_device

# Odd constants of splitmix64 (Steele et al., 2014), as signed integers: products wrap around.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def normal_noise(tokens: RoutedTokens, key: Tensor, *, num_tokens: int, num_experts: int) -> Tensor:
    """Return numbers of the standard normal distribution, [N, E] float32, on the key's device.

    Args:
        tokens: of the pass.
        key: [] int64, of the router.
    """
    return torch.special.ndtri(_uniform(tokens, key, num_tokens, num_experts)).float()


def gumbel_noise(tokens: RoutedTokens, key: Tensor, *, num_tokens: int, num_experts: int) -> Tensor:
    """Return numbers of the standard Gumbel distribution, [N, E] float32; see `normal_noise`."""
    return -torch.log(-torch.log(_uniform(tokens, key, num_tokens, num_experts))).float()


def _uniform(tokens: RoutedTokens, key: Tensor, num_tokens: int, num_experts: int) -> Tensor:
    """Return numbers strictly between 0 and 1, [N, E] float64."""
    state = key.expand(num_tokens)
    for part in _parts(tokens, num_tokens, key.device):
        state = _mixed(state ^ _mixed(part))
    experts = torch.arange(1, num_experts + 1, device=key.device)
    bits = _shifted(_mixed(state[:, None] + experts * _GOLDEN), 12)
    return (bits.double() + 0.5) * 2.0**-52  # a float64 holds 52 bits and a half exactly, so neither 0 nor 1


def _parts(tokens: RoutedTokens, num_tokens: int, device: torch.device) -> list[Tensor]:
    """Return the integers [N] that tell a token from others."""
    ids = [] if tokens.ids is None else [tokens.ids]
    if tokens.segments is None:
        return [torch.arange(num_tokens, device=device), *ids]
    segments = tokens.segments
    groups = to_device([torch.tensor(segments.group_ids)], device)[0][segments.segment_of_token]
    return [groups, segments.sequence_of_token, segments.position_ids, *ids]


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Return a shift to the right that fills with zeros; torch's own repeats the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _mixed(state: Tensor) -> Tensor:
    """Return splitmix64's finaliser of integers [...] int64."""
    state = state + _GOLDEN
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)
