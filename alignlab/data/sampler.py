"""Which items a step takes: every item once an epoch, resumable at any batch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from alignlab.errors import CheckpointError, ConfigError


class IndexSampler:
    """Batches of item numbers without an end.

    Each epoch is a permutation of all items that depends on (seed, epoch) alone. A batch goes on into the next epoch
    where one ends in the middle of it, so no item is left out and none comes twice in an epoch, whatever the sizes.

    Args:
        digest: of the items; see `data.sequences.digest_of`.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int, *, digest: str = "") -> None:
        if num_items < 1 or batch_size < 1:
            raise ConfigError(
                f"a sampler needs at least one item and a batch of at least one, and has {num_items} items and "
                f"batches of {batch_size}; check the dataset"
            )
        self.num_items = num_items
        self.batch_size = batch_size
        self.seed = seed
        self.digest = digest
        self.epoch = 0
        self._position = 0
        self._order = self._permutation(0)

    def next(self) -> list[int]:
        """The numbers of the next `batch_size` items."""
        return self.take(self.batch_size)

    def take(self, count: int) -> list[int]:
        """The numbers of the next `count` items, for a step that needs more or fewer."""
        taken: list[int] = []
        while len(taken) < count:
            if self._position == self.num_items:
                self.epoch += 1
                self._position = 0
                self._order = self._permutation(self.epoch)
            stop = min(self._position + count - len(taken), self.num_items)
            taken += self._order[self._position : stop]
            self._position = stop
        return taken

    def state_dict(self) -> dict[str, int | str]:
        """Where it stands, as JSON can hold it."""
        return {
            "num_items": self.num_items, "seed": self.seed, "digest": self.digest,
            "epoch": self.epoch, "position": self._position,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken.

        Raises:
            CheckpointError: the state is of other data, or of another seed.
        """
        for name, own in (("num_items", self.num_items), ("seed", self.seed), ("digest", self.digest)):
            if state[name] != own:
                raise CheckpointError(
                    f"the data's position can be resumed on the same data and seed only, and {name} was "
                    f"{state[name]} and is {own}; restore the data and the seed, or begin a new run"
                )
        self.epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._order = self._permutation(self.epoch)

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(self.num_items))
        # A string is seeded through SHA-512, the same in every process and version.
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
