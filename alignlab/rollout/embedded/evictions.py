"""A budget of tokens for each running sequence: no step goes beyond a boundary, and at each one tokens are dropped.

Here are the blocks alone: which tokens stay is chosen, and moved, by `evicting_cache`. It is done at once, since blocks
that are free after that may be written to before the step is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from alignlab.models.sink_window import KeptTokens
from alignlab.rollout.embedded.block_pools import BlockPools, PoolNeed
from alignlab.rollout.embedded.sequence import TokenSequence


@dataclass(frozen=True)
class Eviction:
    """A sequence at a boundary, where the tokens over a budget are dropped.

    Attributes:
        sequence: as it was before.
        boundary: tokens that it has.
        num_tokens: those of them that are still in the cache.
        sources, targets: blocks of these, and of those that stay.
        query_blocks: blocks of the newest queries.
        num_before_queries: tokens in these blocks before the observed ones.
    """

    sequence: TokenSequence
    boundary: int
    num_tokens: int
    sources: list[int]
    targets: list[int]
    query_blocks: list[int]
    num_before_queries: int


class Stayed(NamedTuple):
    """The tokens that stayed at a boundary, by layer: [K, tokens].

    Attributes:
        places: among those that were there.
        positions: in the sequence.
        received: attention, see `heavy_hitters`.
    """

    places: dict[int, Tensor]
    positions: dict[int, Tensor]
    received: dict[int, Tensor]


Evict = Callable[[Eviction], Stayed]


class TokenBudget:
    """The boundaries of the running sequences.

    Args:
        kept: what stays at a boundary.
        pools: owners of the blocks.
        running: the sequences, the first to join first.
        preempt: takes a running sequence's blocks, and lets it wait.
        evict: moves what stays.
    """

    def __init__(
        self, kept: KeptTokens, pools: BlockPools, running: list[TokenSequence],
        preempt: Callable[[TokenSequence], None], evict: Evict,
    ) -> None:
        self._kept, self._pools, self._running, self._preempt = kept, pools, running, preempt
        self._evict = evict
        self._manager = pools.managers[kept]

    def most_tokens(self, sequence: TokenSequence) -> int:
        """Return how many tokens of a sequence come before its next boundary."""
        boundary = self._kept.next_boundary(sequence.num_computed, sequence.num_prompt)
        return sys.maxsize if boundary is None else boundary - sequence.num_computed

    def is_due(self, sequence: TokenSequence) -> bool:
        """Return whether a sequence is at a boundary at which tokens have yet to be dropped."""
        return self._kept.num_dropped(sequence.num_computed, sequence.num_prompt) > sequence.num_dropped

    def shorten_drafts(self, sequence: TokenSequence) -> None:
        """Take off the drafts of a sequence that come after its next boundary."""
        if sequence.num_drafts:
            drafts = sequence.take_drafts()
            sequence.add_drafts(drafts[: max(0, self.most_tokens(sequence) - sequence.num_pending)])

    def drop(self) -> None:
        """Drop the tokens over the budget of the running sequences that are at a boundary.

        Sequences with the same blocks, as forks have after their prompt, share those of what stays.
        """
        done: dict[tuple[int, ...], tuple[list[int], Stayed]] = {}
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            num_dropped = self._kept.num_dropped(sequence.num_computed, sequence.num_prompt)
            if sequence.num_pending and num_dropped > sequence.num_dropped:
                key = (sequence.num_computed, *sequence.tables[self._kept])
                if key in done:
                    self._join(sequence, done[key][0])
                elif not self._make_room(sequence, num_dropped):
                    break
                else:
                    eviction = self._move(sequence, num_dropped)
                    done[key] = eviction.targets, self._evict(eviction)
                places, sequence.stayed, sequence.received = done[key][1]
                sequence.evictions[sequence.num_computed] = places
                sequence.num_dropped = num_dropped
            index += 1

    def _join(self, sequence: TokenSequence, targets: Sequence[int]) -> None:
        """Give a sequence the blocks of what stays of another one with the same blocks."""
        shared = [self._manager.share(block) for block in targets]
        for block in sequence.tables[self._kept]:
            self._manager.release(block)
        sequence.tables[self._kept] = shared

    def _make_room(self, sequence: TokenSequence, num_dropped: int) -> bool:
        """Free blocks for what stays of a sequence where its own are shared; return False if it was pre-empted itself.
        """
        while self._manager.num_free < self._num_shared(self._first_blocks(sequence, num_dropped)):
            victim = self._running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _move(self, sequence: TokenSequence, num_dropped: int) -> Eviction:
        """Return the move of what stays of a sequence to its own first blocks, or new ones where others use them."""
        kept, manager, boundary = self._kept, self._manager, sequence.num_computed
        sources, first = sequence.tables[kept], self._first_blocks(sequence, num_dropped)
        num_shared, targets = self._num_shared(first), []
        for block in first:
            is_shared = manager.users(block) > 1
            num_shared -= is_shared
            if is_shared or (manager.is_published(block) and manager.num_free > num_shared):
                targets.append(manager.allocate())
            else:
                manager.withdraw(block)
                targets.append(manager.share(block))
        for block in sources:
            manager.release(block)
        sequence.tables[kept] = list(targets)
        first_query = boundary - min(kept.observed, boundary)
        first_block, num_before = divmod(first_query, self._pools.block_size)
        queries = sequence.tables[kept.query_window][first_block : self._pools.blocks_for(boundary)]
        return Eviction(
            sequence, boundary, boundary - sequence.num_dropped, sources, targets, queries, num_before
        )

    def _first_blocks(self, sequence: TokenSequence, num_dropped: int) -> list[int]:
        """Return the first blocks of a sequence, as many as what stays of it needs."""
        return sequence.tables[self._kept][: self._pools.blocks_for(sequence.num_computed - num_dropped)]

    def _num_shared(self, blocks: Sequence[int]) -> int:
        """Return how many of the blocks other sequences use too."""
        return sum(self._manager.users(block) > 1 for block in blocks)


def make_budget(
    pools: BlockPools, running: list[TokenSequence], preempt: Callable[[TokenSequence], None], evict: Evict | None
) -> TokenBudget | None:
    """Return the budget of the sequences whose blocks are in pools; None where none is dropped."""
    kept = next((window for window in pools.managers if isinstance(window, KeptTokens)), None)
    if kept is None:
        return None
    assert evict is not None, "a budget's tokens are dropped by someone"
    return TokenBudget(kept, pools, running, preempt, evict)


def budget_need(
    sequences: Sequence[TokenSequence], kept: KeptTokens, block_size: int, max_running: int
) -> PoolNeed:
    """Return the blocks that sequences with a budget need: beside what stays of all, one prompt that is computed."""
    after = sorted(-(-kept.most_kept(s.max_tokens, s.num_prompt) // block_size) for s in sequences)
    prompts = [-(-s.num_prompt // block_size) for s in sequences]
    least = max([*after, *prompts], default=0)
    return PoolNeed(least, max(least, sum(after[-max_running:]) + max(prompts, default=0)))
