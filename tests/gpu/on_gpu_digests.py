"""Digests of weights on a GPU: those of the same weights on a CPU, without a copy of them, and with a single wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from alignlab.models.sync_digests import WORD_SUMS, XXH3, PendingDigests, sync_digests


def test_digests_are_those_of_a_cpu_and_the_host_waits_once_for_all_tensors(gpu: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 5), (4096,), (7, 4099), (40, 4096), (), (0, 2))
    tensors = {str(shape): torch.randn(shape, generator=generator).bfloat16() for shape in shapes}
    expected = sync_digests(tensors, algorithm=WORD_SUMS)
    with gpu() as mode:
        there = {name: tensor.to("cuda:0") for name, tensor in tensors.items()}
        sync_digests(there)  # the multipliers reach the device at first use
        mode.reset()
        pending = PendingDigests()
        for name, tensor in there.items():
            pending.add(name, tensor)
        assert not mode.num_waits and not mode.transfers, mode.report()
        assert pending.read() == expected
        assert mode.num_waits == 1, mode.report()
        assert sync_digests(there, algorithm=XXH3) == sync_digests(tensors), "as an engine on a CPU digests them"
