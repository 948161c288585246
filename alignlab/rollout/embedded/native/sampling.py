"""Tokens drawn by the kernels, where no row is truncated, penalised or banned a token."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from alignlab.rollout.embedded.native.binding import Kernels
from alignlab.rollout.embedded.sampling import Sampled, SamplingTable, sample

_DRAWN = {"any_greedy", "any_temperature"}
_OTHERS = [field.name for field in fields(SamplingTable) if field.name.startswith("any_") and field.name not in _DRAWN]
"""Flags of steps that the kernels do not have."""


class NativeSampling:
    """Samples as `sampling.sample` does, with the same draws, by the kernels where they can.

    Args:
        kernels: of any dtype; logits are float32.
    """

    def __init__(self, kernels: Kernels) -> None:
        self._kernels = kernels

    def __call__(self, logits: Tensor, table: SamplingTable, positions: Tensor, **options: Any) -> Sampled:
        """Sample one token for each row of logits [B,V]; arguments as in `sampling.sample`."""
        has_options = any(value is not None for value in options.values())
        if has_options or logits.dtype != torch.float32 or any(getattr(table, name) for name in _OTHERS):
            return sample(logits, table, positions, **options)
        temperatures = table.temperature
        if table.any_greedy:
            temperatures = temperatures.masked_fill(table.greedy, 0.0)
        return Sampled(*self._kernels.draw(logits, table.keys, positions, temperatures.contiguous()))
