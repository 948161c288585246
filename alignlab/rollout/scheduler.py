"""Which tokens of which sequences are computed next.

Every step continues all running sequences by one token and fills up with prompt tokens, up to a budget: a long prompt
is cut into chunks, and a sequence joins as soon as there is a place for it. Sequences that wait for a prompt which
another one is computing fork from it when it is done. When blocks run out the sequence that joined last gives its
blocks up; it waits at the head of the queue, and is computed again from its tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from alignlab.rollout.block_manager import BlockManager, chain_digest
from alignlab.rollout.sequence import TokenSequence


@dataclass(frozen=True)
class Work:
    """Compute `count` tokens of a sequence, from `start`; after the last known token another can be sampled."""

    sequence: TokenSequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        return self.start + self.count == len(self.sequence.token_ids)


@dataclass
class Step:
    """Attributes:
    work: what to compute.
    copies: (from, to) blocks to copy before it.
    """

    work: list[Work] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """The waiting and the running sequences of one call.

    Args:
        manager: whose blocks the sequences get.
        root: what their digests begin with; None shares nothing between sequences.
        max_running: sequences in work together.
        prefill_tokens: tokens of prompts (and of sequences computed again) in one step.
    """

    def __init__(self, manager: BlockManager, *, root: bytes | None, max_running: int, prefill_tokens: int) -> None:
        self.manager = manager
        self.running: list[TokenSequence] = []
        self.waiting: deque[TokenSequence] = deque()
        self.num_preempted = 0
        self._root = root
        self._max_running = max_running
        self._prefill_tokens = prefill_tokens

    def add(self, sequences: Iterable[TokenSequence]) -> None:
        """Queue sequences; those of one request must come one after another."""
        self.waiting.extend(sequences)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def schedule(self) -> Step:
        """Choose what to compute, and give it blocks."""
        step = Step()
        preempted = self.num_preempted
        budget = self._continue_running(step)
        while budget > 0 and self.waiting and len(self.running) < self._max_running:
            if self.num_preempted > preempted or not self._admit(self.waiting[0]):
                break
            sequence = self.running[-1]
            count = min(sequence.num_pending, budget)
            step.work.append(Work(sequence, sequence.num_computed, count))
            budget -= count
        assert step.work or not self.has_work, "the cache holds any one sequence, so something can always be computed"
        return step

    def commit(self, step: Step) -> list[tuple[TokenSequence, int]]:
        """Take note that a step was computed.

        Returns:
            (sequence, index of the work after which its next token is sampled); forks share an index.
        """
        samples = []
        for index, work in enumerate(step.work):
            work.sequence.num_computed += work.count
            self._publish(work.sequence)
            if work.samples:
                samples.append((work.sequence, index))
                samples += [(fork, index) for fork in self._fork(work.sequence)]
        return samples

    def finish(self, sequence: TokenSequence) -> None:
        """Take a sequence out and free its blocks."""
        self.running.remove(sequence)
        self._release(sequence)

    def _continue_running(self, step: Step) -> int:
        """Schedule the sequences in work, each one's next token or chunk; returns what is left of the budget."""
        budget, index = self._prefill_tokens, 0
        while index < len(self.running):
            sequence = self.running[index]
            count = sequence.num_pending if sequence.num_pending == 1 else min(sequence.num_pending, budget)
            if not self._make_room(sequence, step):
                break
            if count:
                step.work.append(Work(sequence, sequence.num_computed, count))
            budget -= count if sequence.num_pending > 1 else 0
            index += 1
        return budget

    def _make_room(self, sequence: TokenSequence, step: Step) -> bool:
        """Let `sequence` own the blocks it writes to next; False if it had to be pre-empted itself."""
        manager = self.manager
        missing = manager.blocks_for(len(sequence.token_ids)) - len(sequence.blocks)
        first = sequence.num_computed // manager.block_size
        shared = first < len(sequence.blocks) and manager.users(sequence.blocks[first]) > 1
        while manager.num_free < missing + shared:
            victim = self.running[-1]
            self._preempt(victim)
            if victim is sequence:
                return False
            shared = shared and manager.users(sequence.blocks[first]) > 1
        if shared:
            copy = manager.allocate()
            step.copies.append((sequence.blocks[first], copy))
            manager.release(sequence.blocks[first])
            sequence.blocks[first] = copy
        sequence.blocks += [manager.allocate() for _ in range(missing)]
        return True

    def _admit(self, sequence: TokenSequence) -> bool:
        """Start the first waiting sequence if there are blocks for all its tokens."""
        manager = self.manager
        self._find_prefix(sequence)
        missing = manager.blocks_for(len(sequence.token_ids)) - len(sequence.blocks)
        if manager.num_free < missing:
            self._release(sequence)
            return False
        sequence.blocks += [manager.allocate() for _ in range(missing)]
        self.running.append(self.waiting.popleft())
        if self._root is not None and not sequence.num_sampled:
            while self.waiting and _same_start(self.waiting[0], sequence):
                sequence.followers.append(self.waiting.popleft())
        return True

    def _fork(self, leader: TokenSequence) -> list[TokenSequence]:
        """Let followers join with the prompt that `leader` computed, as many as there is room for."""
        places = min(self._max_running - len(self.running), self.manager.num_free, len(leader.followers))
        forks, rest = leader.followers[:places], leader.followers[places:]
        leader.followers = []
        for fork in forks:
            fork.num_computed = leader.num_computed
            fork.blocks = [self.manager.share(block) for block in leader.blocks]
            fork.digests = list(leader.digests)
        self.running += forks
        self.waiting.extendleft(reversed(rest))
        return forks

    def _preempt(self, sequence: TokenSequence) -> None:
        """Take blocks from the sequence that joined last."""
        self.num_preempted += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.extendleft(reversed(sequence.followers))
        sequence.followers = []
        self.waiting.appendleft(sequence)

    def _release(self, sequence: TokenSequence) -> None:
        for block in reversed(sequence.blocks):  # the end of a prefix is forgotten before its beginning
            self.manager.release(block)
        sequence.blocks, sequence.digests, sequence.num_computed = [], [], 0

    def _find_prefix(self, sequence: TokenSequence) -> None:
        """Take the published blocks that the sequence begins with; at least its last token is left to compute."""
        size = self.manager.block_size
        while self._root is not None and (len(sequence.blocks) + 1) * size < len(sequence.token_ids):
            digest = self._next_digest(sequence)
            block = self.manager.find(digest)
            if block is None:
                break
            sequence.digests.append(digest)
            sequence.blocks.append(block)
            sequence.num_computed += size

    def _publish(self, sequence: TokenSequence) -> None:
        """Let full blocks be found by others."""
        size = self.manager.block_size
        while self._root is not None and (len(sequence.digests) + 1) * size <= sequence.num_computed:
            digest = self._next_digest(sequence)
            self.manager.publish(sequence.blocks[len(sequence.digests)], digest)
            sequence.digests.append(digest)

    def _next_digest(self, sequence: TokenSequence) -> bytes:
        assert self._root is not None
        size, known = self.manager.block_size, len(sequence.digests)
        parent = sequence.digests[-1] if known else self._root
        return chain_digest(parent, sequence.token_ids[known * size : (known + 1) * size])


def _same_start(waiting: TokenSequence, leader: TokenSequence) -> bool:
    return waiting.request is leader.request and not waiting.num_sampled
