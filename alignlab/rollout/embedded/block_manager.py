"""The blocks of the paged cache: how many sequences use each, and which can be found again by their tokens.

A block holds the entries of `block_size` consecutive tokens of a sequence, in every layer. Sequences with a common
beginning share blocks; each block counts its users. A full block is published under a digest of all tokens up to its
end. Without users it can still be found until its space is needed; the block that was unused longest is taken first.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b

import torch

from alignlab.errors import ConfigError, RolloutError


def chain_digest(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Return the digest of a block's tokens and of all tokens before them, whose digest is `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=16).digest()


def block_size_for(size: int | None, device: torch.device, *, group: int = 1) -> int:
    """Return the tokens in a block: `size`, or what suits the device.

    Args:
        group: tokens that the cache keeps together, which divide a given size.

    Raises:
        ConfigError: a GPU's kernels read tiles of keys that must divide a block, and cannot read blocks of this size.
    """
    usual = 128 if device.type == "cuda" else 16
    size = size or -(-usual // group) * group
    if device.type != "cuda" or group > 1:  # a cache with groups is gathered
        return size
    if size < 16 or size & (size - 1):
        raise ConfigError(
            f"rollout.block_size is {size}, and must be a power of two, at least 16, on a GPU; leave it out, or use "
            f"{max(16, 1 << (size.bit_length() - 1))}"
        )
    return size


class BlockManager:
    """Counts of users, free blocks and published blocks, without the tensors."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self._users: list[int] = []
        self._stamps: list[int] = []
        self._num_allocated = 0
        self._digests: list[bytes | None] = []
        self._published: dict[bytes, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()  # in the order in which they are taken
        self.grow(num_blocks)

    @property
    def num_blocks(self) -> int:
        return len(self._users)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_published(self) -> int:
        return len(self._published)

    def users(self, block: int) -> int:
        """Return the number of sequences that use `block`."""
        return self._users[block]

    def blocks_for(self, num_tokens: int) -> int:
        """Return the number of blocks that `num_tokens` tokens need."""
        return -(-num_tokens // self.block_size)

    def grow(self, num_blocks: int) -> None:
        """Add free blocks up to `num_blocks` in all."""
        for block in range(self.num_blocks, num_blocks):
            self._users.append(0)
            self._stamps.append(0)
            self._digests.append(None)
            self._free[block] = None

    def allocate(self) -> int:
        """Return a free block, whose content is no longer needed; it has one user then.

        Raises:
            RolloutError: none is free.
        """
        if not self._free:
            raise RolloutError(
                f"all {self.num_blocks} blocks of the cache are in use; raise rollout.cache_tokens or lower "
                "rollout.max_running"
            )
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._users[block] = 1
        self._num_allocated += 1
        self._stamps[block] = self._num_allocated
        return block

    def stamp(self, block: int) -> int:
        """Return a number that a block has until it is allocated again, and that no block has had before."""
        return self._stamps[block]

    def take_unchanged(self, block: int, stamp: int) -> bool:
        """Add a user to a published block, in use or free, that has kept its stamp; return False if it has not."""
        if self._stamps[block] != stamp or not self.is_published(block):
            return False
        self._free.pop(block, None)
        self._users[block] += 1
        return True

    def share(self, block: int) -> int:
        """Add a user to a block in use, and return the block."""
        assert self._users[block] > 0, f"block {block} is free"
        self._users[block] += 1
        return block

    def release(self, block: int) -> None:
        """Remove a user of a block; unused blocks that can be found again are reused last."""
        assert self._users[block] > 0, f"block {block} is free already"
        self._users[block] -= 1
        if self._users[block] == 0:
            self._free[block] = None
            self._free.move_to_end(block, last=self._digests[block] is not None)

    def publish(self, block: int, digest: bytes) -> None:
        """Publish a full block under `digest`, unless another block is published under it already."""
        assert self._users[block] > 0, f"block {block} is free"
        if digest not in self._published and self._digests[block] is None:
            self._published[digest] = block
            self._digests[block] = digest

    def find(self, digest: bytes) -> int | None:
        """Return the block published under `digest`, with a user more; None if there is none."""
        block = self._published.get(digest)
        if block is not None:
            self._free.pop(block, None)
            self._users[block] += 1
        return block

    def withdraw(self, block: int) -> None:
        """Let a block no longer be found; its users keep it."""
        self._forget(block)

    def is_published(self, block: int) -> bool:
        """Return whether `block` can be found."""
        return self._digests[block] is not None

    def knows(self, digest: bytes) -> bool:
        """Return whether a block is published under `digest`."""
        return digest in self._published

    def take(self, digest: bytes) -> int:
        """Return the block published under `digest`, which there must be, with a user more."""
        block = self.find(digest)
        assert block is not None, "nothing is published under this digest"
        return block

    def forget_all(self) -> None:
        """Withdraw all published blocks; blocks in use stay in use."""
        for block in list(self._published.values()):
            self._forget(block)

    def reset(self) -> None:
        """Free all blocks, and withdraw all published ones."""
        num_blocks = self.num_blocks
        self._users, self._digests, self._stamps = [], [], []
        self._published, self._free = {}, OrderedDict()
        self.grow(num_blocks)

    def _forget(self, block: int) -> None:
        digest, self._digests[block] = self._digests[block], None
        if digest is not None:
            del self._published[digest]
