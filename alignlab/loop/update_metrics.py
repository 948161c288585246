"""Numbers of an update: from sums on the device, over several updates, and of experts' use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

_COUNTERS = ("empty_updates", "skipped_updates")


def expert_load_metrics(counts: Tensor) -> dict[str, Tensor]:
    """Return the extremes of the experts' use over all layers, 1 being equal use, and each expert's mean part.

    Args:
        counts: [L, E], of all ranks.
    """
    load = counts / counts.sum(dim=-1, keepdim=True).clamp(min=1)
    num_experts = load.shape[-1]
    return {
        "expert_load_min": load.min() * num_experts,
        "expert_load_max": load.max() * num_experts,
        **{f"expert_load/{i}": value for i, value in enumerate(load.mean(dim=0).unbind())},
    }


def numbers(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Return scalars on the device as numbers, for which the host waits once."""
    values = torch.stack(list(tensors.values())).tolist() if tensors else []
    return dict(zip(tensors, values, strict=True))


def mean_over_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return each metric's mean over the updates that have it; for counts since the run's start, the last value."""
    means: dict[str, float] = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        values = [update[name] for update in updates if name in update]
        means[name] = values[-1] if name.rpartition("/")[2] in _COUNTERS else sum(values) / len(values)
    return means
