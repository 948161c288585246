"""The order of a dataset's items: every item once an epoch, resumable at any batch."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from alignlab.errors import CheckpointError, ConfigError


class IndexSampler:
    """Endless batches of item indices.

    Each epoch is a permutation of all items, determined by (seed, epoch) alone. A batch may end in the next epoch: so
    every item comes exactly once in an epoch, whatever the batch size.

    Args:
        digest: digest of the items; see `data.dataset.digest_of`.
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
        """Return the indices of the next `batch_size` items."""
        return self.take(self.batch_size)

    def take(self, count: int) -> list[int]:
        """Return the indices of the next `count` items, for a step that needs more or fewer."""
        indices: list[int] = []
        while len(indices) < count:
            if self._position == self.num_items:
                self.epoch += 1
                self._position = 0
                self._order = self._permutation(self.epoch)
            stop = min(self._position + count - len(indices), self.num_items)
            indices += self._order[self._position : stop]
            self._position = stop
        return indices

    def state_dict(self) -> dict[str, int | str]:
        """Return the position in the data, as JSON."""
        return {
            "num_items": self.num_items, "seed": self.seed, "digest": self.digest,
            "epoch": self.epoch, "position": self._position,
        }  # fmt: skip

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at the position of a `state_dict`.

        Raises:
            CheckpointError: the state is of other data, or of another seed.
        """
        for name, current in (("num_items", self.num_items), ("seed", self.seed), ("digest", self.digest)):
            if state[name] != current:
                raise CheckpointError(
                    f"the data's position can be resumed on the same data and seed only, and {name} was "
                    f"{state[name]} and is {current}; restore the data and the seed, or begin a new run"
                )
        self.epoch = int(state["epoch"])
        self._position = int(state["position"])
        self._order = self._permutation(self.epoch)

    def _permutation(self, epoch: int) -> list[int]:
        order = list(range(self.num_items))
        # Python seeds with a string through SHA-512: the same order in every process and version.
        random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order
