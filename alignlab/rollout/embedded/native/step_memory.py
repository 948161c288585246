"""A step as the kernels read it: the places of its tokens, and the memory that it computes in.

Letters in shapes: N tokens, W works, T tables of pools, D hidden size, H heads, K kv heads, M tokens with logits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from alignlab.models.config import PolicyConfig
from alignlab.rollout.embedded.native.binding import (
    LANES,
    TILE_ROWS,
    Kernels,
    RoundedRowsStruct,
    StepStruct,
    address,
    code_words,
)
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.rounding import Rounding
from alignlab.rollout.embedded.scheduler import Work
from alignlab.rollout.embedded.step_plan import block_table, logit_tokens


class StepPlaces(NamedTuple):
    """Places of a step's tokens.

    Attributes:
        tokens, positions: [N] int64, ids, and positions in their sequences.
        works: [N] int64, the sequence that each token belongs to.
        starts: [W + 1] int64, where each sequence's tokens begin.
        tables: [T,W,blocks] int64, by the cache's windows in their order.
        logit_tokens: [M] int64.
    """

    tokens: Tensor
    positions: Tensor
    works: Tensor
    starts: Tensor
    tables: Tensor
    logit_tokens: Tensor

    @property
    def num_positions(self) -> int:
        return int(self.positions.max()) + 1

    def slots(self, pool: int, block_size: int) -> Tensor:
        """Return the places [N] of the tokens in the cache of one pool."""
        blocks = self.tables[pool, self.works, self.positions // block_size]
        return blocks * block_size + self.positions % block_size


def places_of(work: Sequence[Work], cache: PagedCache) -> StepPlaces:
    """Return the places of the tokens of `work`, in its order."""
    counts = np.array([w.count for w in work])
    ends = np.cumsum(counts)
    rows = np.repeat(np.arange(len(work)), counts)
    positions = np.arange(len(rows)) + (np.array([w.start for w in work]) - (ends - counts))[rows]
    ids = chain.from_iterable(w.sequence.token_ids[w.start : w.start + w.count] for w in work)
    tables = np.stack([block_table(work, cache.block_size, window) for window in cache.windows])
    arrays = (
        np.fromiter(ids, np.int64, len(rows)), positions, rows, np.concatenate(([0], ends)), tables,
        logit_tokens(work, ends),
    )
    return StepPlaces(*(torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)) for array in arrays))


def check_places(places: StepPlaces, cache: PagedCache, num_embeddings: int) -> None:
    """Check that tokens have embeddings, and blocks are in the cache: kernels read and write there unasked.

    Raises:
        ValueError: one is not.
    """
    low, high = (int(value) for value in places.tokens.aminmax())
    if low < 0 or high >= num_embeddings:
        raise ValueError(f"tokens are {low} to {high}, and the model has {num_embeddings} embeddings")
    for window, table in zip(cache.windows, places.tables, strict=True):
        low, high = (int(value) for value in table.aminmax())
        if low < 0 or high >= cache.num_blocks[window]:
            raise ValueError(f"blocks are {low} to {high}, and window {window} has {cache.num_blocks[window]}")


class StepMemory:
    """Memory in which steps are computed, which grows with them.

    Args:
        config: of the model.
        kernels: for its dtype.
        rounding: of its weights.
    """

    def __init__(self, config: PolicyConfig, kernels: Kernels, rounding: Rounding | None = None) -> None:
        self._rounding = rounding
        self._config = config
        self._kernels = kernels
        self._tensors: dict[str, Tensor] = {}

    def step(self, places: StepPlaces, cache: PagedCache) -> tuple[StepStruct, Tensor, Tensor | None]:
        """Return the structure of a step, and what it will write.

        Returns:
            The structure; the final hidden states [M,D]; and the choices [N, sparse layers, chosen] int16 of a mixture.
        """
        config, num_tokens = self._config, len(places.tokens)
        struct = StepStruct()
        integers = torch.int64
        num_works, width = places.tables.shape[1:]
        hidden = torch.empty(len(places.logit_tokens), config.hidden_size, dtype=self._kernels.dtype)
        num_keys = -(-width * cache.block_size // LANES) * LANES
        struct.hold(
            tokens=(places.tokens, (num_tokens,), integers), positions=(places.positions, (num_tokens,), integers),
            works=(places.works, (num_tokens,), integers), starts=(places.starts, (num_works + 1,), integers),
            tables=(places.tables, (len(cache.windows), num_works, width), integers),
            logit_tokens=(places.logit_tokens, (-1,), integers), num_tokens=num_tokens, num_works=num_works,
            width=width, num_logits=len(hidden), num_threads=torch.get_num_threads(), num_keys=num_keys,
            hidden=(hidden, tuple(hidden.shape), self._kernels.dtype),
        )
        for name, shape in self._shapes(num_tokens, num_keys, struct.num_threads).items():
            setattr(struct, name, self._place(name, shape))
        if self._rounding is not None:
            self._hold_rounded(struct.rounded, num_tokens, self._rounding.group)
        choices = None
        if config.sparse_layers:
            choices = self._hold_mixture(struct, num_tokens)
        return struct, hidden, choices

    def _shapes(self, num_tokens: int, num_keys: int, num_threads: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the memory of any model by name, in numbers or words of 4 bytes."""
        config, words = self._config, self._kernels.words
        heads, kv_heads, size, width = (
            config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
        )
        assert kv_heads is not None and size is not None
        rows, inner = self._most_rows(num_tokens), self._inner
        return {
            "residual": (num_tokens, width), "normed": (num_tokens, words(width)),
            "qkv": (num_tokens, max((heads + 2 * kv_heads) * size, width)),
            "queries": (num_tokens, heads, words(size)), "attended": (num_tokens, words(heads * size)),
            "activated": (rows, words(inner)), "outputs": (rows, width),
            "scores": (num_threads, TILE_ROWS, num_keys),
        }

    def _most_rows(self, num_tokens: int) -> int:
        """Return the rows of the feed-forwards' products: tokens, or the choices of a mixture."""
        return num_tokens * max(1, self._config.num_experts_per_tok if self._config.sparse_layers else 1)

    @property
    def _inner(self) -> int:
        config = self._config
        return max(config.intermediate_size, config.moe_intermediate_size or 0, config.shared_expert_size)

    def _hold_rounded(self, struct: RoundedRowsStruct, num_tokens: int, group: int | None) -> None:
        """Add the memory of rounded rows, which each product with rounded weights writes anew."""
        config, rows = self._config, self._most_rows(num_tokens)
        assert config.head_dim is not None
        size = max(config.hidden_size, config.num_attention_heads * config.head_dim, self._inner)
        struct.codes = self._place("codes", (rows, code_words(size)))
        struct.scales = self._place("code_scales", (rows,))
        struct.sums = self._place("code_sums", (rows, size // group if group else 0))

    def _hold_mixture(self, struct: StepStruct, num_tokens: int) -> Tensor:
        """Add the memory of a mixture to a step, and return the choices that it will write."""
        config = self._config
        num_choices = num_tokens * config.num_experts_per_tok
        struct.gathered = self._place("gathered", (num_choices, self._kernels.words(config.hidden_size)))
        struct.gates = self._place("gates", (num_choices,))
        struct.logits = self._place("logits", (num_tokens, config.num_experts))
        struct.orders = self._place("orders", (2, 2 * num_choices + config.num_experts + 1))  # of 8 bytes
        shape = (num_tokens, len(config.sparse_layers), config.num_experts_per_tok)
        choices = torch.empty(shape, dtype=torch.int16)
        struct.hold(choices=(choices, shape, torch.int16), num_sparse=shape[1])
        return choices

    def _place(self, name: str, shape: tuple[int, ...]) -> int:
        """Return the address of memory of a name, of at least so many words of 4 bytes."""
        numel = math.prod(shape)
        held = self._tensors.get(name)
        if held is None or held.numel() < numel:
            held = self._tensors[name] = torch.zeros(numel, dtype=torch.int32)
        return address(held, (-1,), torch.int32)
