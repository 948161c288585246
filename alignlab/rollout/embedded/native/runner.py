"""Steps computed by the kernels: embeddings, layers and final norm of all tokens of a step in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from alignlab.rollout.embedded.block_pools import Window
from alignlab.rollout.embedded.native.binding import Kernels
from alignlab.rollout.embedded.native.sampling import NativeSampling
from alignlab.rollout.embedded.native.step_memory import StepMemory, check_places, places_of
from alignlab.rollout.embedded.native.weights import NativeWeights
from alignlab.rollout.embedded.runner import Runner
from alignlab.rollout.embedded.sampler import Sampler
from alignlab.rollout.embedded.scheduler import Step


class NativeRunner(Runner):
    """Computes the steps that the scheduler chose by the kernels.

    Blocks of the cache are in the kernels' order (source/attention.h): a cache belongs to one runner.
    """

    def __init__(
        self, model: nn.Module, weights: NativeWeights, kernels: Kernels, block_size: int, *, max_running: int
    ) -> None:
        super().__init__(model, weights, block_size, max_running=max_running, replay=False)
        self._native_weights = weights
        self._kernels = kernels
        self._memory: StepMemory | None = None

    def resize(self, num_blocks: Mapping[Window, int], num_slots: int) -> None:
        """Have a cache of `num_blocks` blocks, by window, without entries; of none, free the memory of steps too."""
        super().resize(num_blocks, num_slots)
        if not any(num_blocks.values()):
            self._memory = None

    def sampler(self) -> Sampler:
        """Return a new sampler that draws by the kernels where they can."""
        return Sampler(NativeSampling(self._kernels))

    def hidden(self, step: Step, others: Sequence[Tensor] = ()) -> tuple[Tensor, list[Tensor]]:
        """Compute a step; arguments and result as in `Runner.hidden`."""
        for window, pairs in step.copies.items():
            self.cache.copy(window, torch.tensor(pairs, dtype=torch.int64))
        packed = self._native_weights.packed
        memory = self._memory = self._memory or StepMemory(
            packed.config, self._kernels, self._native_weights.rounding
        )
        places = places_of(step.work, self.cache)
        check_places(places, self.cache, packed.num_embeddings)
        packed.use_cache(self.cache)
        packed.reach(places.num_positions)
        struct, hidden, choices = memory.step(places, self.cache)
        self._kernels.step(packed.struct, struct)
        if choices is not None:
            slots = places.slots(self.cache.windows.index(None), self.cache.block_size)
            self.cache.write_routing(slots, choices)
        return hidden, list(others)
