"""The places of sequences' states: one slot a sequence, copied when it is written and others still read it.

A sequence reads one slot and writes another, or the same where nobody else reads it. All layers read a step's slots
before they write them, so that a fork costs no copy of its own. Slot 0 is zero: sequences begin there.
"""

from __future__ import annotations

from typing import NamedTuple

from alignlab.rollout.embedded.block_manager import BlockManager
from alignlab.rollout.embedded.sequence import TokenSequence

ZERO = 0
LEAST_SLOTS = 3
"""For one sequence: zero, its state, and the state that it goes on from where that was published."""


class StateUse(NamedTuple):
    """Slots of one sequence in one step: the state before it, and the place of the state after it."""

    read: int
    write: int


def slots_needed(num_running: int, num_requests: int) -> int:
    """Return the slots that let sequences run together without one giving way, with room to keep states of prompts.

    Args:
        num_running: sequences that run together.
        num_requests: prompts of theirs.
    """
    return LEAST_SLOTS + num_running - 1 + num_requests


class StateSlots:
    """Owners of the slots; see the top of this module."""

    def __init__(self) -> None:
        self._manager = BlockManager(0, 1)

    @property
    def num_slots(self) -> int:
        return self._manager.num_blocks

    @property
    def num_free(self) -> int:
        return self._manager.num_free

    def grow(self, num_slots: int) -> None:
        """Have `num_slots` slots in all, the zero slot included."""
        is_new = self.num_slots == 0
        self._manager.grow(num_slots)
        if is_new and num_slots:
            assert self._manager.allocate() == ZERO

    def missing(self, sequence: TokenSequence) -> int:
        """Return how many slots must be free before a sequence is computed: 0 or 1."""
        slot = sequence.state
        return int(slot is None or self._manager.users(slot) > 1 or self._manager.is_published(slot))

    def begin(self, sequence: TokenSequence) -> StateUse:
        """Return the slots of a sequence's next step; a new one is allocated where its own must stay as it is."""
        old = sequence.state
        if not self.missing(sequence):
            assert old is not None
            return StateUse(old, old)
        sequence.state = self._manager.allocate()
        if old is None:
            return StateUse(ZERO, sequence.state)
        self._manager.release(old)
        return StateUse(old, sequence.state)

    def allocate(self, sequence: TokenSequence) -> int:
        """Give a sequence without a state a slot of its own, and return it; what it holds is the caller's to write."""
        assert sequence.state is None
        sequence.state = self._manager.allocate()
        return sequence.state

    def fork(self, leader: TokenSequence, follower: TokenSequence) -> None:
        """Let a sequence go on from the state of another."""
        assert leader.state is not None
        follower.state = self._manager.share(leader.state)

    def release(self, sequence: TokenSequence) -> None:
        """Free the slot of a sequence, if it has one."""
        if sequence.state is not None:
            self._manager.release(sequence.state)
            sequence.state = None

    def publish(self, sequence: TokenSequence, digest: bytes) -> None:
        """Let others find a sequence's state under the digest of the tokens that it stands for."""
        assert sequence.state is not None
        self._manager.publish(sequence.state, digest)

    def knows(self, digest: bytes) -> bool:
        """Return whether a state is published under `digest`."""
        return self._manager.knows(digest)

    def take(self, sequence: TokenSequence, digest: bytes) -> None:
        """Let a sequence go on from the state that is published under `digest`."""
        sequence.state = self._manager.take(digest)

    def forget_all(self) -> None:
        """Withdraw all published states."""
        self._manager.forget_all()

    def reset(self) -> None:
        """Free all slots, and withdraw all published states."""
        num_slots = self.num_slots
        self._manager = BlockManager(0, 1)
        self.grow(num_slots)
