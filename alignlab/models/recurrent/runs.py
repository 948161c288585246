"""The tokens by which sequences go on from what they kept: one each, or several in a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from alignlab.types import Segments


@dataclass(frozen=True)
class Runs:
    """Consecutive tokens of R sequences, each of which has kept entries of its own.

    Attributes:
        num_single: sequences that go on by one token; their tokens come first.
        lengths: tokens of each other sequence, in order.
        device: of the tokens.
    """

    num_single: int
    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def segments(self) -> Segments:
        """The tokens after the first `num_single`: a root for each sequence."""
        count = len(self.lengths)
        return Segments(self.lengths, (-1,) * count, tuple(range(count)), (0,) * count, self.device)

    def single(self, *tensors: Tensor) -> list[Tensor]:
        """Return what the sequences that go on by one token have, of tensors by token or by sequence."""
        return [tensor[: self.num_single] for tensor in tensors]

    def longer(self, *tensors: Tensor) -> list[Tensor]:
        """Return what the other sequences have, likewise."""
        return [tensor[self.num_single :] for tensor in tensors]


Entries = Mapping[str, Tensor]
"""What sequences keep, by name, [R, ...]."""


class StateLayout(Protocol):
    """A layout that keeps entries of sequences itself: of the embedded engine."""

    @property
    def runs(self) -> Runs:
        """The tokens, by sequence."""
        ...

    def states(self, layer_idx: int) -> Entries:
        """Return what a layer has kept of each sequence."""
        ...

    def keep_states(self, layer_idx: int, entries: Entries) -> None:
        """Keep what a layer has made of each sequence."""
        ...
