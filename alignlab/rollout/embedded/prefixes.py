"""Blocks that sequences share because they begin alike: found and published by chained digests of their tokens."""

from __future__ import annotations

from collections.abc import Iterator

from alignlab.rollout.embedded.block_manager import chain_digest
from alignlab.rollout.embedded.block_pools import BlockPools
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.rollout.embedded.state_slots import StateSlots


class Prefixes:
    """The published blocks of one call, and states after them.

    Args:
        pools: owners of the blocks.
        states: owners of the slots of states; None where no layer keeps one.
        root: prefix of all digests; None shares nothing between sequences.

    Attributes:
        is_shared: whether sequences share anything.
    """

    def __init__(self, pools: BlockPools, states: StateSlots | None, root: bytes | None) -> None:
        self.is_shared = root is not None
        self._pools, self._states, self._root = pools, states, root

    def find(self, sequence: TokenSequence) -> None:
        """Share the published blocks that the sequence begins with, up to the first token that needs logits.

        Where layers keep states, up to the last block after which one was published.
        """
        if self._states is None:
            sequence.digests, sequence.tables = self._pools.find(self._digests(sequence))
        else:
            sequence.digests, sequence.tables = self._pools.find(self._digests(sequence), self._states.knows)
            if sequence.digests:
                self._states.take(sequence, sequence.digests[-1])
        sequence.num_computed = len(sequence.digests) * self._pools.block_size

    def publish(self, sequence: TokenSequence) -> None:
        """Publish full blocks, so that later sequences find them, and the state after the last one that they share.

        Not of a sequence of which tokens were dropped: what follows them is another in another sequence.
        """
        if sequence.num_dropped:
            return
        size = self._pools.block_size
        num_certain = min(sequence.num_computed, len(sequence.token_ids) - sequence.num_drafts)
        while self._root is not None and (len(sequence.digests) + 1) * size <= num_certain:
            count = len(sequence.digests)
            digest = self._digest(sequence, count, sequence.digests[-1] if count else self._root)
            self._pools.publish(sequence.tables, count, digest)
            sequence.digests.append(digest)
        if self._states is not None and sequence.digests and sequence.num_computed == self.last_shared(sequence):
            self._states.publish(sequence, sequence.digests[-1])

    def publish_again(self, sequence: TokenSequence) -> None:
        """Publish the blocks of a sequence that were copied back, under the digests that it has; see `publish`."""
        if sequence.num_dropped:
            return
        for index, digest in enumerate(sequence.digests):
            self._pools.publish(sequence.tables, index, digest)

    def last_shared(self, sequence: TokenSequence) -> int:
        """Return the tokens in the full blocks of a sequence before its first token that needs logits."""
        return sequence.first_logits // self._pools.block_size * self._pools.block_size

    def _digests(self, sequence: TokenSequence) -> Iterator[bytes]:
        """Yield the digests of a sequence's full blocks before its first token that needs logits, if they are shared.
        """
        parent = self._root
        for index in range(0 if parent is None else sequence.first_logits // self._pools.block_size):
            assert parent is not None
            parent = self._digest(sequence, index, parent)
            yield parent

    def _digest(self, sequence: TokenSequence, index: int, parent: bytes) -> bytes:
        """Return the digest of one block of a sequence; `parent` is that of the block before it."""
        size = self._pools.block_size
        return chain_digest(parent, sequence.token_ids[index * size : (index + 1) * size])
