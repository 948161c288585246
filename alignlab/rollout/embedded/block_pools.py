"""The blocks of a cache by the window of the layers that they belong to.

Layers that see all tokens need the blocks of all tokens; layers with a window only those of the last ones, and of sinks
before them. Each window
has a pool of blocks of its own, and a sequence has a table of blocks in each pool. The blocks that a window has left
are released, so that a pool holds what its layers may still read. A block that other sequences use stays theirs.

A table has an entry for each block of the sequence, `EXPIRED` for those that were released.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from alignlab.errors import RolloutError
from alignlab.models.sink_window import KeptTokens, SinkWindow, Window, size_of
from alignlab.rollout.embedded.block_manager import BlockManager

EXPIRED = -1
Tables = dict[Window, list[int]]


def first_visible(position: int, window: Window, block_size: int) -> int:
    """Return the first block that a token at a position, or a later one, reads, beside those of sinks."""
    size = size_of(window)
    return 0 if size is None else max(0, position - size + 1) // block_size


def sink_blocks(window: Window, block_size: int) -> int:
    """Return how many of a sequence's first blocks all tokens read, whatever the window's size."""
    return -(-window.sinks // block_size) if isinstance(window, SinkWindow) else 0


def most_blocks(num_tokens: int, window: Window, chunk: int, block_size: int) -> int:
    """Return the most blocks that one sequence holds in a pool.

    Args:
        num_tokens: of the sequence.
        window: of the pool.
        chunk: tokens that it computes in one step, at most.
        block_size: tokens in a block.
    """
    every = -(-num_tokens // block_size)
    size = size_of(window)
    if size is None:
        return every
    return min(every, -(-(size - 1 + chunk) // block_size) + 1 + sink_blocks(window, block_size))


def pool_blocks(lengths: Sequence[int], window: Window, chunk: int, block_size: int) -> int:
    """Return the most blocks that sequences which run together hold in a pool, if they share none.

    Args:
        lengths: tokens of each.
        window: of the pool.
        chunk: tokens of prompts in one step, of all sequences together.
        block_size: tokens in a block.
    """
    every = sum(-(-length // block_size) for length in lengths)
    if window is None:
        return every
    if isinstance(window, KeptTokens):  # beside what stays, a prompt that is computed
        kept = sum(-(-window.most_kept(length, 0) // block_size) for length in lengths)
        return min(every, kept + -(-max(lengths, default=0) // block_size))
    # Each has the blocks of its window before a step, and the step's tokens may begin one block more in each.
    of_windows = sum(most_blocks(length, window, 1, block_size) + 1 for length in lengths)
    return min(every, of_windows + -(-chunk // block_size))


class PoolNeed(NamedTuple):
    """Blocks that a pool needs.

    Attributes:
        least: for one sequence, the longest.
        all: for all sequences that run together.
    """

    least: int
    all: int


def shared_out(
    num_bytes: int, block_bytes: Mapping[Window, int], needs: Mapping[Window, PoolNeed]
) -> dict[Window, int]:
    """Return how many blocks each pool may have so that all together take at most a number of bytes.

    Each has the least that it needs; what is left is divided in proportion to what they need beyond. If all of it does
    not suffice for the least, each pool has less in proportion.

    Args:
        num_bytes: for all pools.
        block_bytes: bytes of one block, by window.
        needs: by window.
    """
    spare = num_bytes - sum(block_bytes[window] * need.least for window, need in needs.items())
    if spare < 0:
        return {window: need.least * num_bytes // (num_bytes - spare) for window, need in needs.items()}
    beyond = sum(block_bytes[window] * (need.all - need.least) for window, need in needs.items())
    if beyond <= spare:
        return {window: need.all for window, need in needs.items()}
    return {window: need.least + (need.all - need.least) * spare // beyond for window, need in needs.items()}


def check_room(
    needs: Mapping[Window, PoolNeed], limits: Mapping[Window, int], block_size: int, *, in_file: bool = False
) -> None:
    """Raise a RolloutError if the longest sequence alone needs more blocks than the limits allow.

    Args:
        in_file: the limits are of a file.
    """
    where, fix = "half of the free memory", "free memory"
    if in_file:
        where, fix = "the file of rollout.kv_cache", "raise kv_cache.max_gib or free room on the disk"
    for window, need in needs.items():
        if need.least > limits[window]:
            raise RolloutError(
                f"the longest sequence needs {need.least * block_size} tokens of cache, and {where} "
                f"holds {limits[window] * block_size}; lower max_new_tokens or {fix}"
            )


class BlockPools:
    """A `BlockManager` for each window.

    Args:
        windows: of the layers; None for layers that see all tokens.
        block_size: tokens in a block.

    Attributes:
        managers: by window.
    """

    def __init__(self, windows: Collection[Window], block_size: int) -> None:
        self.block_size = block_size
        self.managers: dict[Window, BlockManager] = {window: BlockManager(0, block_size) for window in windows}

    @property
    def num_blocks(self) -> int:
        """Blocks of all pools."""
        return sum(manager.num_blocks for manager in self.managers.values())

    @property
    def num_free(self) -> int:
        """Free blocks of all pools."""
        return sum(manager.num_free for manager in self.managers.values())

    @property
    def num_published(self) -> int:
        """Blocks of all pools that can be found."""
        return sum(manager.num_published for manager in self.managers.values())

    @property
    def sizes(self) -> dict[Window, int]:
        """Blocks of each pool."""
        return {window: manager.num_blocks for window, manager in self.managers.items()}

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def empty_tables(self) -> Tables:
        """Return the tables of a sequence without blocks."""
        return {window: [] for window in self.managers}

    def grow(self, sizes: Mapping[Window, int]) -> None:
        """Add free blocks up to these numbers."""
        for window, manager in self.managers.items():
            manager.grow(sizes[window])

    def forget_all(self) -> None:
        """Withdraw all published blocks; blocks in use stay in use."""
        for manager in self.managers.values():
            manager.forget_all()

    def reset(self) -> None:
        """Free all blocks, and withdraw all published ones."""
        for manager in self.managers.values():
            manager.reset()

    def have_free(self, counts: Mapping[Window, int]) -> bool:
        """Return whether so many blocks of each pool are free."""
        return all(manager.num_free >= counts[window] for window, manager in self.managers.items())

    def extend(self, tables: Tables, counts: Mapping[Window, int]) -> None:
        """Allocate so many blocks of each pool at the ends of a sequence's tables."""
        for window, manager in self.managers.items():
            tables[window] += [manager.allocate() for _ in range(counts[window])]

    def expire(self, tables: Tables, position: int) -> None:
        """Release the blocks that no token from `position` on reads."""
        for window, table in tables.items():
            if window is not None:
                end = min(first_visible(position, window, self.block_size), len(table))
                start, first = end, sink_blocks(window, self.block_size)
                while start > first and table[start - 1] != EXPIRED:
                    start -= 1
                for index in range(start, end):
                    self.managers[window].release(table[index])
                    table[index] = EXPIRED

    def release(self, tables: Tables) -> None:
        """Release all blocks of a sequence."""
        for window, table in tables.items():
            for block in reversed(table):  # blocks of a prefix's beginning are reused after those of its end
                if block != EXPIRED:
                    self.managers[window].release(block)

    def share(self, tables: Tables) -> Tables:
        """Return tables of the same blocks, each with a user more."""
        return {
            window: [block if block == EXPIRED else self.managers[window].share(block) for block in table]
            for window, table in tables.items()
        }

    def publish(self, tables: Tables, index: int, digest: bytes) -> None:
        """Publish the full blocks at one place of a sequence's tables under a digest."""
        for window, table in tables.items():
            if table[index] != EXPIRED:
                self.managers[window].publish(table[index], digest)

    def find(
        self, digests: Iterable[bytes], can_go_on: Callable[[bytes], bool] = lambda _: True
    ) -> tuple[list[bytes], Tables]:
        """Find the most leading blocks after which a sequence can go on.

        Pools of windows need not have the blocks that a token after them does not see.

        Args:
            digests: of the sequence's blocks; no more of them are asked for than can be found.
            can_go_on: whether what else a sequence needs is there after the block of a digest.

        Returns:
            The digests of these blocks, and their tables, with a user more of each block.
        """
        leading = self._leading(digests, can_go_on)
        return leading, {window: self._taken(window, leading) for window in self.managers}

    def _leading(self, digests: Iterable[bytes], can_go_on: Callable[[bytes], bool]) -> list[bytes]:
        """Return the digests of the most leading blocks after which a sequence can go on; see `find`."""
        last_missing = dict.fromkeys(self.managers, -1)
        have_sinks = dict.fromkeys(self.managers, True)
        published: list[bytes] = []
        count = 0
        for index, digest in enumerate(digests):
            for window, manager in self.managers.items():
                if not manager.knows(digest):
                    last_missing[window] = index
                    have_sinks[window] &= index >= sink_blocks(window, self.block_size)
            if last_missing.get(None, -1) >= 0:
                break
            published.append(digest)
            next_token = (index + 1) * self.block_size
            has_visible = all(
                have_sinks[w] and last < first_visible(next_token, w, self.block_size)
                for w, last in last_missing.items()
            )
            if has_visible and can_go_on(digest):
                count = index + 1
        return published[:count]

    def _taken(self, window: Window, digests: Sequence[bytes]) -> list[int]:
        """Return the table of the blocks of these digests, with a user more of those that the next token sees."""
        first = first_visible(len(digests) * self.block_size, window, self.block_size)
        num_sinks = sink_blocks(window, self.block_size)
        return [
            self.managers[window].take(digest) if index < num_sinks or index >= first else EXPIRED
            for index, digest in enumerate(digests)
        ]
