"""The choice of the tokens that each step computes.

Every step continues all running sequences by their next tokens and fills up with prompt tokens, up to a budget: a long
prompt is cut into chunks, and a sequence joins as soon as there is a place for it. Sequences that wait for a prompt
which another one is computing fork from it when it is done. When blocks run out, the sequence that joined last frees
its blocks; it waits at the head of the queue, and is computed again from its tokens, or copied back from the host.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from alignlab.models.sink_window import KeptTokens
from alignlab.rollout.embedded.block_pools import BlockPools, PoolNeed, Window, most_blocks, pool_blocks
from alignlab.rollout.embedded.evictions import Evict, budget_need, make_budget
from alignlab.rollout.embedded.prefixes import Prefixes
from alignlab.rollout.embedded.sequence import Request, TokenSequence
from alignlab.rollout.embedded.state_slots import StateSlots, StateUse
from alignlab.rollout.embedded.swapping import SwapStore


@dataclass(frozen=True)
class Work:
    """Tokens of one sequence to be computed in one step.

    Attributes:
        start: position of the first token.
        count: number of tokens.
        num_logits: number of last tokens of the work after which logits are needed: 0 inside a prompt, 1 to sample the
            next token, more to get the log-probs of several given tokens at once.
        states: slots of its state before and after; None where no layer keeps one.
    """

    sequence: TokenSequence
    start: int
    count: int
    num_logits: int
    states: StateUse | None = None


@dataclass
class Step:
    """The work of one step.

    Attributes:
        work: the tokens to compute.
        copies: (source, target) blocks to copy before, by window.
    """

    work: list[Work] = field(default_factory=list)
    copies: dict[Window, list[tuple[int, int]]] = field(default_factory=dict)


def blocks_needed(
    sequences: Sequence[TokenSequence], block_size: int, max_running: int,
    *, share: bool, window: Window = None, chunk: int = 0,
) -> int:
    """Return the most blocks that `sequences` hold while up to `max_running` of them run together.

    Args:
        sequences: all sequences of a call.
        block_size: tokens in a block.
        max_running: sequences that run together.
        share: True if sequences of one request share the full blocks of the prompt.
        window: of the layers; None if they see all tokens.
        chunk: tokens of prompts in one step, of all sequences together.
    """
    if window is not None:
        longest = sorted(sequence.max_tokens for sequence in sequences)[-max_running:]
        bound = pool_blocks(longest, window, chunk, block_size)
        return min(bound, blocks_needed(sequences, block_size, max_running, share=share))
    shared: dict[Request, int] = {}
    unshared = []
    for sequence in sequences:
        common = shared.setdefault(sequence.request, sequence.num_prompt // block_size if share else 0)
        unshared.append(-(-sequence.max_tokens // block_size) - common)
    return sum(sorted(unshared)[-max_running:]) + sum(sorted(shared.values())[-max_running:])


def pool_needs(
    sequences: Sequence[TokenSequence], windows: Iterable[Window], block_size: int,
    *, max_running: int, chunk: int, share: bool,
) -> dict[Window, PoolNeed]:
    """Return the blocks that the sequences of a call need in each pool; arguments as in `blocks_needed`."""
    longest = max((sequence.max_tokens for sequence in sequences), default=0)
    needs: dict[Window, PoolNeed] = {}
    for window in windows:
        if isinstance(window, KeptTokens):
            needs[window] = budget_need(sequences, window, block_size, max_running)
            continue
        least = most_blocks(longest, window, chunk, block_size)
        every = blocks_needed(sequences, block_size, max_running, share=share, window=window, chunk=chunk)
        needs[window] = PoolNeed(least, max(least, every))
    return needs


class Scheduler:
    """The waiting and the running sequences of one call.

    Args:
        pools: owners of the blocks.
        states: owners of the slots of states; None where no layer keeps one.
        root: prefix of all digests; None shares nothing between sequences.
        max_running: sequences that run together.
        prefill_tokens: tokens of prompts (and of sequences computed again) in one step.
        evict: drops the tokens over a budget, where pools have one.
        swap: keeps what a sequence that gives way has computed; None computes it again.

    Attributes:
        num_preempted: sequences that had to free their blocks, so far.
    """

    def __init__(
        self, pools: BlockPools, *, root: bytes | None, max_running: int, prefill_tokens: int,
        states: StateSlots | None = None, swap: SwapStore | None = None, evict: Evict | None = None,
    ) -> None:
        self.pools = pools
        self._swap = swap
        self._states = states
        self.running: list[TokenSequence] = []
        self.waiting: deque[TokenSequence] = deque()
        self.num_preempted = 0
        self._prefixes = Prefixes(pools, states, root)
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens
        self._budget = make_budget(pools, self.running, self._preempt, evict)

    def add(self, sequences: Iterable[TokenSequence]) -> None:
        """Queue sequences; those of one request must be consecutive."""
        self.waiting.extend(sequences)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> Step:
        """Choose the next tokens to compute, and allocate blocks for them."""
        step = Step()
        num_preempted = self.num_preempted
        if self._budget is not None:
            self._budget.drop()
        budget = self._continue_running(step)
        while budget > 0 and self.waiting and len(self.running) < self._max_running:
            # A sequence that just freed its blocks would be admitted again at once, and take them back.
            if self.num_preempted > num_preempted or not self._admit(self.waiting[0], budget):
                break
            sequence = self.running[-1]
            if not self._drop_due(sequence, budget, step):
                break
            count = self._next_count(sequence, budget)
            step.work.append(self._work(sequence, count))
            budget -= count
        assert step.work or not self.has_work, "the cache holds any one sequence, so something can always be computed"
        return step

    def commit(self, step: Step) -> list[tuple[TokenSequence, slice]]:
        """Record that a step was computed, and let sequences that waited for a prompt fork.

        Returns:
            (sequence, its rows among all logits of the step) of every sequence with logits; forks share rows.
        """
        outputs: list[tuple[TokenSequence, slice]] = []
        first_row = 0
        for work in step.work:
            sequence, rows = work.sequence, slice(first_row, first_row + work.num_logits)
            first_row = rows.stop
            sequence.num_computed += work.count
            self._prefixes.publish(sequence)
            if work.num_logits:
                outputs.append((sequence, rows))
            if not sequence.num_pending:
                outputs += [(fork, rows) for fork in self._fork(sequence)]
        return outputs

    def finish(self, sequence: TokenSequence) -> None:
        """Remove a sequence and free its blocks."""
        self.running.remove(sequence)
        self._release(sequence)

    def drop(self, sequence: TokenSequence) -> None:
        """Remove a sequence, running or waiting, and free its blocks."""
        if sequence in self.running:
            self.finish(sequence)
        else:
            self.waiting.remove(sequence)
            if self._swap is not None:
                self._swap.forget(sequence)

    def fork(self, leader: TokenSequence, fork: TokenSequence) -> None:
        """Start a sequence on the blocks of a running one that has the same tokens."""
        fork.num_computed = leader.num_computed
        fork.tables = self.pools.share(leader.tables)
        fork.digests = list(leader.digests)
        fork.num_dropped, fork.stayed, fork.received = leader.num_dropped, leader.stayed, leader.received
        fork.evictions = dict(leader.evictions)
        if self._states is not None:
            self._states.fork(leader, fork)
        self.running.append(fork)

    def _continue_running(self, step: Step) -> int:
        """Schedule the next token or chunk of every running sequence; return the rest of the budget."""
        budget, index = self._prefill_tokens, 0
        while index < len(self.running):
            sequence = self.running[index]
            if self._budget is not None:
                self._budget.shorten_drafts(sequence)
            is_decoded = sequence.num_pending <= 1 + sequence.num_drafts
            count = sequence.num_pending if is_decoded else self._next_count(sequence, budget)
            if not self._make_room(sequence, count, step):
                break
            if count:
                step.work.append(self._work(sequence, count))
            budget -= 0 if is_decoded else count
            index += 1
        return budget

    def _make_room(self, sequence: TokenSequence, count: int, step: Step) -> bool:
        """Allocate the blocks that the next `count` tokens are written to; return False if `sequence` was pre-empted.

        Blocks that a window has left are released first.
        """
        self.pools.expire(sequence.tables, sequence.num_computed)
        for window, manager in self.pools.managers.items():
            while manager.num_free < self._missing(sequence, window, count) + self._is_shared(sequence, window):
                if self._preempt_newest() is sequence:
                    return False
        while not self._has_slot(sequence):
            if self._preempt_newest() is sequence:
                return False
        for window, manager in self.pools.managers.items():
            table = sequence.tables[window]
            if self._is_shared(sequence, window):
                first = self._place(sequence, window) // manager.block_size
                copy = manager.allocate()
                step.copies.setdefault(window, []).append((table[first], copy))
                manager.release(table[first])
                table[first] = copy
        self.pools.extend(sequence.tables, self._all_missing(sequence, count))
        return True

    def _missing(self, sequence: TokenSequence, window: Window, count: int) -> int:
        """Return how many blocks a sequence needs in a pool before its next `count` tokens.

        Layers that see all tokens need the blocks of all tokens that there are at some time, and get them at once.
        """
        end = len(sequence.token_ids) if window is None else self._place(sequence, window) + count
        return max(0, self.pools.blocks_for(end) - len(sequence.tables[window]))

    def _all_missing(self, sequence: TokenSequence, count: int) -> dict[Window, int]:
        """Return how many blocks a sequence needs before its next `count` tokens, by window."""
        return {window: self._missing(sequence, window, count) for window in self.pools.managers}

    def _is_shared(self, sequence: TokenSequence, window: Window) -> bool:
        """Return whether the block that is written next is read by other sequences; it is copied before."""
        first, table = self._place(sequence, window) // self.pools.block_size, sequence.tables[window]
        return first < len(table) and self.pools.managers[window].users(table[first]) > 1

    def _admit(self, sequence: TokenSequence, budget: int) -> bool:
        """Start the first waiting sequence; return False if there are not enough blocks for its next tokens.

        Args:
            budget: tokens that it may compute in this step.
        """
        swap = self._swap if self._swap is not None and sequence in self._swap else None
        on_host: Mapping[Window, int] = {}
        if swap is None:
            self._prefixes.find(sequence)
        else:
            on_host = swap.find(sequence, self.pools)
        missing = self._all_missing(sequence, self._next_count(sequence, budget))
        needed = {window: count + on_host.get(window, 0) for window, count in missing.items()}
        if not self.pools.have_free(needed) or not self._has_slot(sequence):
            self._release(sequence, forget=swap is None)
            return False
        if swap is not None:
            swap.bring_back(sequence, self.pools, self._states)
            self._prefixes.publish_again(sequence)
        self.pools.extend(sequence.tables, missing)
        self.running.append(self.waiting.popleft())
        self._collect_followers(sequence)
        return True

    def _collect_followers(self, leader: TokenSequence) -> None:
        """Take the next waiting sequences out of the queue that can fork from a prompt which `leader` computes."""
        if self._prefixes.is_shared and self._computes_prompt(leader):
            while self.waiting and _same_start(self.waiting[0], leader):
                leader.followers.append(self.waiting.popleft())

    def _drop_due(self, sequence: TokenSequence, count: int, step: Step) -> bool:
        """Drop what the newest running sequence has over its budget; return False if it was pre-empted for that.

        That is one whose blocks were found up to a boundary. The blocks of its next tokens go with what is dropped.

        Args:
            count: tokens that it may compute in this step.
        """
        if self._budget is None or not self._budget.is_due(sequence):
            return True
        self._budget.drop()
        is_running = bool(self.running) and self.running[-1] is sequence
        return is_running and self._make_room(sequence, self._next_count(sequence, count), step)

    def _computes_prompt(self, sequence: TokenSequence) -> bool:
        """Return True if others of the request should wait for what this sequence is about to compute."""
        if sequence.scored_ids:  # of these, others share full blocks alone
            return sequence.num_computed + self.pools.block_size <= sequence.first_logits
        return not sequence.num_sampled

    def _fork(self, leader: TokenSequence) -> list[TokenSequence]:
        """Start followers on the blocks of the prompt that `leader` computed, as many as there is room for.

        Followers with tokens of their own to score wait again instead, and find the prompt's full blocks by digest.
        """
        num_free = min(manager.num_free for manager in self.pools.managers.values())
        if self._states is not None:
            num_free = min(num_free, self._states.num_free)
        places = min(self._max_running - len(self.running), num_free, len(leader.followers))
        if leader.scored_ids:
            places = 0
        forks, still_waiting = leader.followers[:places], leader.followers[places:]
        leader.followers = []
        for fork in forks:
            self.fork(leader, fork)
        self.waiting.extendleft(reversed(still_waiting))
        return forks

    def _preempt_newest(self) -> TokenSequence:
        """Pre-empt the running sequence that joined last, and return it."""
        newest = self.running[-1]
        self._preempt(newest)
        return newest

    def _preempt(self, sequence: TokenSequence) -> None:
        """Free the blocks of a running sequence, which waits again at the head of the queue."""
        self.num_preempted += 1
        sequence.take_drafts()
        self.pools.expire(sequence.tables, sequence.num_computed)
        is_whole = self._budget is None or not self._budget.is_due(sequence)
        is_kept = self._swap is not None and is_whole and self._swap.take_out(sequence, self.pools)
        if sequence.scored_ids and not is_kept:  # its given tokens are scored again, from the first
            sequence.raw_logprobs = []
        self.running.remove(sequence)
        self._release(sequence, forget=not is_kept)
        self.waiting.extendleft(reversed(sequence.followers))
        sequence.followers = []
        self.waiting.appendleft(sequence)

    def _release(self, sequence: TokenSequence, *, forget: bool = True) -> None:
        """Free the blocks and the slot of a sequence; with `forget`, none of its tokens counts as computed then."""
        self.pools.release(sequence.tables)
        if self._states is not None:
            self._states.release(sequence)
        sequence.tables = self.pools.empty_tables()
        if forget:
            sequence.digests, sequence.num_computed = [], 0
            sequence.num_dropped, sequence.stayed, sequence.received = 0, {}, {}

    def _next_count(self, sequence: TokenSequence, budget: int) -> int:
        """Return how many tokens of a sequence to compute next: states are kept at the end of the blocks it shares."""
        count = min(sequence.num_pending, budget)
        if self._budget is not None:
            count = min(count, self._budget.most_tokens(sequence))
        until = self._prefixes.last_shared(sequence) - sequence.num_computed
        return min(count, until) if self._states is not None and self._prefixes.is_shared and until > 0 else count

    def _place(self, sequence: TokenSequence, window: Window) -> int:
        """Return how many tokens before the next one a sequence has in a pool."""
        return sequence.num_computed - (sequence.num_dropped if isinstance(window, KeptTokens) else 0)

    def _has_slot(self, sequence: TokenSequence) -> bool:
        """Return whether there is a slot for the state of a sequence after its next tokens."""
        return self._states is None or self._states.num_free >= self._states.missing(sequence)

    def _work(self, sequence: TokenSequence, count: int) -> Work:
        """Return the work of the next `count` tokens of a sequence."""
        start = sequence.num_computed
        num_logits = max(0, start + count - max(start, sequence.first_logits))
        return Work(sequence, start, count, num_logits, None if self._states is None else self._states.begin(sequence))


def _same_start(waiting: TokenSequence, leader: TokenSequence) -> bool:
    return waiting.request is leader.request and not waiting.num_sampled and not waiting.num_computed
