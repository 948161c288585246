"""The room of an engine's cache: its blocks and slots, and how many there may be in the memory that is free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil
import torch

from alignlab.config.rollout import RolloutSettings, step_tokens
from alignlab.errors import RolloutError
from alignlab.rollout.embedded.block_pools import BlockPools, PoolNeed, Window, check_room, shared_out
from alignlab.rollout.embedded.runner import Runner
from alignlab.rollout.embedded.scheduler import Scheduler, pool_needs
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.rollout.embedded.state_slots import LEAST_SLOTS, StateSlots, slots_needed
from alignlab.rollout.embedded.swapping import SwapStore


class CacheSpace:
    """The blocks and the slots of an engine's cache.

    Args:
        runner: whose cache it is.
        settings: of the engine.
        block_size: tokens in a block.
        share: sequences of one request share the full blocks of the prompt.
        swaps: sequences that give way are kept on the host, where the settings say so.

    Attributes:
        blocks: of entries of tokens.
        states: slots of states; None where no layer keeps one.
        swap: the store on the host; None where sequences that gave way are computed again.
    """

    def __init__(
        self, runner: Runner, settings: RolloutSettings, block_size: int, *, share: bool, swaps: bool = False
    ) -> None:
        self._runner = runner
        self._settings = settings
        self._block_size = block_size
        self._share = share
        self.blocks = BlockPools(runner.cache.windows, block_size)
        self.states = StateSlots() if runner.states else None
        self.swap: SwapStore | None = None
        if swaps and settings.preemption == "swap":
            self.swap = SwapStore(runner.cache, runner.states, int(settings.swap_gib * 2**30))

    def scheduler(self, root: bytes | None) -> Scheduler:
        """Return a scheduler of these blocks, without sequences; `root` as of `Scheduler`."""
        return Scheduler(
            self.blocks, root=root, max_running=self._settings.max_running,
            prefill_tokens=self._settings.prefill_tokens, states=self.states, swap=self.swap,
            evict=self._runner.evict,
        )

    def reserve(self, sequences: Sequence[TokenSequence]) -> None:
        """Allocate blocks and slots for as many sequences as run together, within the limits.

        Raises:
            RolloutError: the longest sequence alone needs more.
        """
        needs = pool_needs(
            sequences, self.blocks.sizes, self._block_size, max_running=self._settings.max_running,
            chunk=step_tokens(self._settings), share=self._share,
        )
        num_slots = self._num_slots(sequences)
        limits = self._block_limits(needs, num_slots)
        check_room(needs, limits, self._block_size, in_file=self._runner.cache.max_file_bytes() is not None)
        held = self.blocks.sizes
        sizes = {window: max(held[window], min(need.all, limits[window])) for window, need in needs.items()}
        if sizes != held or num_slots != self._held_slots:
            self._runner.resize(sizes, num_slots)
            self.reset()  # of published blocks too: their entries are gone
            self.blocks.grow(sizes)
            if self.states is not None:
                self.states.grow(num_slots)

    def holds(self, sequences: Sequence[TokenSequence]) -> bool:
        """Return whether the limits allow blocks and slots for all these sequences at once.

        Raises:
            RolloutError: not even one slot for states has room.
        """
        needs = pool_needs(
            sequences, self.blocks.sizes, self._block_size, max_running=len(sequences),
            chunk=step_tokens(self._settings), share=self._share,
        )
        num_slots = self._num_slots(sequences)
        num_requests = len({id(sequence.request) for sequence in sequences}) if self._share else 0
        limits = self._block_limits(needs, num_slots)
        has_slots = self.states is None or num_slots >= slots_needed(len(sequences), num_requests)
        return has_slots and all(need.all <= limits[window] for window, need in needs.items())

    def forget_all(self) -> None:
        """Withdraw all that can be found again; what is in use stays in use."""
        self.blocks.forget_all()
        if self.states is not None:
            self.states.forget_all()

    def reset(self) -> None:
        """Free all blocks and slots, and withdraw what can be found again."""
        self.blocks.reset()
        if self.states is not None:
            self.states.reset()
        if self.swap is not None:
            self.swap.clear()

    def free(self) -> None:
        """Give the memory back; the next `reserve` allocates it again."""
        self.blocks = BlockPools(self._runner.cache.windows, self._block_size)
        self.states = None if self.states is None else StateSlots()
        self._runner.resize(self.blocks.sizes, 0)

    @property
    def _held_slots(self) -> int:
        return 0 if self.states is None else self.states.num_slots

    @property
    def _memory(self) -> int:
        """Bytes that the whole cache may take: what it takes, and half of what is free."""
        device = self._runner.device
        free = _free_of_gpu(device) if device.type == "cuda" else psutil.virtual_memory().available
        return self._runner.cache_bytes + free // 2

    def _num_slots(self, sequences: Sequence[TokenSequence]) -> int:
        """Return the slots of states to have, no fewer than there are: what a call needs, in half of the memory.

        Raises:
            RolloutError: not even one sequence has room.
        """
        if self.states is None:
            return 0
        num_running = min(self._settings.max_running, len(sequences))
        num_requests = len({id(sequence.request) for sequence in sequences}) if self._share else 0
        wanted = slots_needed(num_running, min(num_requests, num_running))
        size = self._runner.states.slot_bytes
        if wanted <= self._held_slots:
            return self._held_slots
        most = self._memory // 2 // size
        if most < LEAST_SLOTS:
            raise RolloutError(
                f"recurrent layers keep {size} bytes of a sequence, and a quarter of the free memory holds {most} "
                f"times that, where {LEAST_SLOTS} are needed; free memory"
            )
        return max(self._held_slots, min(wanted, most))

    def _block_limits(self, needs: Mapping[Window, PoolNeed], num_slots: int) -> dict[Window, int]:
        """Return how many blocks the settings, or the memory beside the slots, and the kernels allow, by window."""
        most = self._runner.max_blocks
        if self._settings.cache_tokens is not None:
            return dict.fromkeys(needs, min(self.blocks.blocks_for(self._settings.cache_tokens), most))
        room = self._runner.cache.max_file_bytes()
        if room is None:
            room = self._memory - num_slots * self._runner.states.slot_bytes
        shares = shared_out(room, self._runner.block_bytes, needs)
        return {window: min(count, most) for window, count in shares.items()}


def _free_of_gpu(device: torch.device) -> int:
    """Return the bytes that can be allocated: what the GPU has free, and what torch holds without using it."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused
