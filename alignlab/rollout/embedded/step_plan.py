"""The places of a step's tokens, computed on the host in arrays and moved to the device in one transfer.

Shapes: W works, N tokens, M tokens after which logits are computed, R rows of a group, Q queries a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignlab.rollout.embedded.paged_attention import RowGroup
from alignlab.rollout.embedded.scheduler import Work
from alignlab.transfer import to_device

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepTensors:
    """A planned step on the device; attributes as in `StepPlan`."""

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    logit_tokens: Tensor
    groups: list[RowGroup]


@dataclass(frozen=True)
class GroupPlan:
    """A `RowGroup` on the host."""

    start: int
    end: int
    padding: _Ints | None
    unpadding: _Ints | None
    blocks: _Ints
    positions: _Ints


@dataclass(frozen=True)
class StepPlan:
    """A step on the host.

    Attributes:
        tokens, positions, slots: [N], token ids, positions in their sequences, and places in the cache.
        logit_tokens: [M], indices of the tokens after which logits are computed, in the order of the works given.
        groups: rows that attend together; they cover the tokens in order.
    """

    tokens: _Ints
    positions: _Ints
    slots: _Ints
    logit_tokens: _Ints
    groups: list[GroupPlan]

    def on(self, device: torch.device, others: Sequence[Tensor] = ()) -> tuple[StepTensors, list[Tensor]]:
        """Return the step and other host tensors on `device`, moved by one copy."""
        optional = [(g.padding, g.unpadding, g.blocks, g.positions) for g in self.groups]
        arrays = [
            self.tokens, self.positions, self.slots, self.logit_tokens,
            *(array for array in chain(*optional) if array is not None),
        ]
        tensors = iter(to_device([*map(torch.from_numpy, arrays), *others], device))
        tokens, positions, slots, logit_tokens = (next(tensors) for _ in range(4))
        groups = [
            RowGroup(
                group.start, group.end,
                padding=None if group.padding is None else next(tensors),
                unpadding=None if group.unpadding is None else next(tensors),
                blocks=next(tensors), positions=next(tensors),
            )
            for group in self.groups
        ]
        return StepTensors(tokens, positions, slots, logit_tokens, groups), list(tensors)


def plan_step(work: Sequence[Work], block_size: int) -> StepPlan:
    """Return the step that computes `work`; works of similar size lie together."""
    order = sorted(range(len(work)), key=lambda index: _size_class(work[index]))
    ordered = [work[index] for index in order]
    counts = np.array([w.count for w in ordered])
    starts = np.array([w.start for w in ordered])
    table = block_table(ordered, block_size)
    ends = np.cumsum(counts)
    rows = np.repeat(np.arange(len(ordered)), counts)
    positions = np.arange(len(rows)) + (starts - (ends - counts))[rows]
    slots = table[rows, positions // block_size] * block_size + positions % block_size
    tokens = np.fromiter(
        chain.from_iterable(w.sequence.token_ids[w.start : w.start + w.count] for w in ordered), np.int64, len(rows)
    )
    groups, row = [], 0
    for _, members in groupby(ordered, key=_size_class):
        end = row + len(list(members))
        first = int(ends[row] - counts[row])
        groups.append(_plan_group(counts[row:end], starts[row:end], table[row:end], first, block_size))
        row = end
    ends_as_given = np.empty(len(order), np.int64)
    ends_as_given[order] = ends
    return StepPlan(tokens, positions, slots, logit_tokens(work, ends_as_given), groups)


def logit_tokens(work: Sequence[Work], ends: _Ints) -> _Ints:
    """Return the indices [M] of the last `num_logits` tokens of each work, whose tokens end at `ends` [W]."""
    counts = np.array([w.num_logits for w in work])
    return np.arange(counts.sum()) + np.repeat(ends - np.cumsum(counts), counts)


def _size_class(work: Work) -> tuple[int, int]:
    """Return the class of a work: within one, queries differ at most twofold and keys fourfold, to bound padding."""
    return (work.count - 1).bit_length(), (work.start + work.count).bit_length() // 2


def block_table(work: Sequence[Work], block_size: int) -> _Ints:
    """Return the blocks that each work reads, [W, most blocks of a work], filled up with block 0."""
    num_blocks = [-(-(w.start + w.count) // block_size) for w in work]
    table = np.zeros((len(work), max(num_blocks)), np.int64)
    for row, (w, count) in enumerate(zip(work, num_blocks, strict=True)):
        table[row, :count] = w.sequence.blocks[:count]
    return table


def _plan_group(counts: _Ints, starts: _Ints, table: _Ints, first: int, block_size: int) -> GroupPlan:
    """Return the group of consecutive rows with these query counts, first positions and blocks.

    Args:
        counts, starts: [R].
        table: [R, blocks].
        first: index of the group's first token in the step.
        block_size: tokens in a block.
    """
    num_queries = int(counts.max())
    width = -(-int((starts + counts).max()) // block_size)
    offsets = np.minimum(np.arange(num_queries), counts[:, None] - 1)
    padding = unpadding = None
    if (counts < num_queries).any():
        padding = (first + np.cumsum(counts) - counts)[:, None] + offsets
        unpadding = np.flatnonzero(np.arange(num_queries) < counts[:, None])
        padding = padding.ravel()
    return GroupPlan(
        first, first + int(counts.sum()), padding, unpadding, table[:, :width].ravel(), starts[:, None] + offsets
    )
