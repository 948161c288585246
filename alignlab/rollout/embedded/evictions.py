"""A budget of tokens for each running sequence: no step goes beyond a boundary, and at each one tokens are dropped.

Here are the blocks alone: which tokens stay is chosen, and moved, by `evicting_cache`. That is done at once, since the
blocks of a sequence may be copied to the host, or be filled from there, before the step is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from alignlab.models.sink_window import KeptTokens
from alignlab.rollout.embedded.block_pools import BlockPools, PoolNeed
from alignlab.rollout.embedded.sequence import TokenSequence


@dataclass(frozen=True)
class Eviction:
    """Sequences with the same tokens and blocks at a boundary, where the tokens over a budget are dropped.

    Attributes:
        boundary: tokens that each has.
        num_tokens: those of them that are still in the cache.
        sources, targets: blocks of these, and of those that stay.
        query_blocks: blocks of the newest queries.
        num_before_queries: tokens in these blocks before the observed ones.
        stayed, received: see `TokenSequence`, at the boundary before.
    """

    sequences: list[TokenSequence]
    boundary: int
    num_tokens: int
    sources: list[int]
    targets: list[int]
    query_blocks: list[int]
    num_before_queries: int
    stayed: dict[int, Tensor]
    received: dict[int, Tensor]


class TokenBudget:
    """The boundaries of the running sequences.

    Args:
        kept: what stays at a boundary.
        pools: owners of the blocks.
        running: the sequences, the first to join first.
        preempt: takes a running sequence's blocks, and lets it wait.
        evict: chooses and moves what stays.
    """

    def __init__(
        self, kept: KeptTokens, pools: BlockPools, running: list[TokenSequence],
        preempt: Callable[[TokenSequence], None], evict: Callable[[Eviction], None],
    ) -> None:
        self._kept, self._pools, self._running, self._preempt = kept, pools, running, preempt
        self._evict = evict
        self._manager = pools.managers[kept]

    def most_tokens(self, sequence: TokenSequence) -> int:
        """Return how many tokens of a sequence come before its next boundary."""
        boundary = self._kept.next_boundary(sequence.num_computed, sequence.num_prompt)
        return sys.maxsize if boundary is None else boundary - sequence.num_computed

    def is_due(self, sequence: TokenSequence) -> bool:
        """Return whether a sequence is at a boundary where tokens are still to be dropped."""
        return self._num_dropped(sequence) > sequence.num_dropped

    def shorten_drafts(self, sequence: TokenSequence) -> None:
        """Take off the drafts of a sequence that come after its next boundary."""
        if sequence.num_drafts:
            drafts = sequence.take_drafts()
            sequence.add_drafts(drafts[: max(0, self.most_tokens(sequence) - sequence.num_pending)])

    def drop(self) -> None:
        """Drop the tokens over the budget of the running sequences that are at a boundary.

        Sequences with the same blocks, as forks have after their prompt, share those of what stays.
        """
        found: dict[tuple[int, ...], Eviction] = {}
        index = 0
        while index < len(self._running):
            sequence = self._running[index]
            num_dropped = self._num_dropped(sequence)
            if sequence.num_pending and num_dropped > sequence.num_dropped:
                key = (sequence.num_computed, *sequence.tables[self._kept])
                if key in found:
                    self._join(found[key], sequence)
                elif not self._make_room(sequence, num_dropped):
                    break
                else:
                    found[key] = self._move(sequence, num_dropped)
                sequence.num_dropped = num_dropped
            index += 1
        for eviction in found.values():
            self._evict(eviction)

    def _num_dropped(self, sequence: TokenSequence) -> int:
        """Return how many tokens of a sequence are dropped before its next one is computed."""
        return self._kept.num_dropped(sequence.num_computed, sequence.num_prompt)

    def _join(self, eviction: Eviction, sequence: TokenSequence) -> None:
        """Give a sequence the blocks of another one with the same blocks."""
        targets = [self._manager.share(block) for block in eviction.targets]
        for block in sequence.tables[self._kept]:
            self._manager.release(block)
        eviction.sequences.append(sequence)
        sequence.tables[self._kept] = targets

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
            [sequence], boundary, boundary - sequence.num_dropped, sources, targets, queries, num_before,
            sequence.stayed, sequence.received,
        )

    def _first_blocks(self, sequence: TokenSequence, num_dropped: int) -> list[int]:
        """Return the first blocks of a sequence, as many as what stays of it needs."""
        return sequence.tables[self._kept][: self._pools.blocks_for(sequence.num_computed - num_dropped)]

    def _num_shared(self, blocks: Sequence[int]) -> int:
        """Return how many of the blocks other sequences use too."""
        return sum(self._manager.users(block) > 1 for block in blocks)


def make_budget(
    pools: BlockPools, running: list[TokenSequence], preempt: Callable[[TokenSequence], None],
    evict: Callable[[Eviction], None] | None,
) -> TokenBudget | None:
    """Return the budget of the sequences whose blocks are in pools; None where none is dropped."""
    kept = next((window for window in pools.managers if isinstance(window, KeptTokens)), None)
    if kept is None:
        return None
    assert evict is not None, "a cache with a budget moves what stays"
    return TokenBudget(kept, pools, running, preempt, evict)


def budget_need(
    sequences: Sequence[TokenSequence], kept: KeptTokens, block_size: int, max_running: int
) -> PoolNeed:
    """Return the blocks that sequences with a budget need: beside what stays of all, one prompt that is computed."""
    after = sorted(-(-kept.most_kept(s.max_tokens, s.num_prompt) // block_size) for s in sequences)
    prompts = [-(-s.num_prompt // block_size) for s in sequences]
    least = max([*after, *prompts], default=0)
    return PoolNeed(least, max(least, sum(after[-max_running:]) + max(prompts, default=0)))
