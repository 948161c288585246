"""Where each token of a step lies: worked out on the host in arrays, and moved to the device in one transfer.

Shapes: W works, N tokens, R rows of a group, Q queries a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignlab.rollout.paged_attention import RowGroup
from alignlab.rollout.scheduler import Work

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class GroupPlan:
    """A `RowGroup` on the host."""

    start: int
    end: int
    padding: _Ints | None
    kept: _Ints | None
    blocks: _Ints
    positions: _Ints


@dataclass(frozen=True)
class StepPlan:
    """Attributes:
    tokens, positions, slots: [N], slots being places in the cache.
    groups: the rows that attend together, covering the tokens in order.
    last: the flat index of each work's last token, in the order of the works given.
    """

    tokens: _Ints
    positions: _Ints
    slots: _Ints
    groups: list[GroupPlan]
    last: list[int]

    def on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor, list[RowGroup]]:
        """(tokens, positions, slots, groups) on `device`."""
        optional = [(g.padding, g.kept, g.blocks, g.positions) for g in self.groups]
        arrays = [self.tokens, self.positions, self.slots, *(a for a in chain(*optional) if a is not None)]
        moved = iter(_transfer(arrays, device))
        tokens, positions, slots = next(moved), next(moved), next(moved)
        groups = [
            RowGroup(
                group.start, group.end,
                padding=None if group.padding is None else next(moved),
                kept=None if group.kept is None else next(moved),
                blocks=next(moved), positions=next(moved),
            )
            for group in self.groups
        ]
        return tokens, positions, slots, groups


def plan_step(work: Sequence[Work], block_size: int) -> StepPlan:
    """Order the works so that those of similar size lie together, and find each token's place."""
    order = sorted(range(len(work)), key=lambda index: _size_class(work[index]))
    ordered = [work[index] for index in order]
    counts = np.array([w.count for w in ordered])
    starts = np.array([w.start for w in ordered])
    table = _block_table(ordered, block_size)
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
    last = np.empty(len(order), np.int64)
    last[order] = ends - 1
    return StepPlan(tokens, positions, slots, groups, last.tolist())


def _size_class(work: Work) -> tuple[int, int]:
    """Rows of one class differ at most twofold in queries and fourfold in keys, which bounds the padding."""
    return (work.count - 1).bit_length(), (work.start + work.count).bit_length() // 2


def _block_table(work: Sequence[Work], block_size: int) -> _Ints:
    """[W, most blocks that one reads], filled up with block 0."""
    needed = [-(-(w.start + w.count) // block_size) for w in work]
    table = np.zeros((len(work), max(needed)), np.int64)
    for row, (w, count) in enumerate(zip(work, needed, strict=True)):
        table[row, :count] = w.sequence.blocks[:count]
    return table


def _plan_group(counts: _Ints, starts: _Ints, table: _Ints, first: int, block_size: int) -> GroupPlan:
    """The group of consecutive rows with these query counts, first positions and blocks."""
    num_queries = int(counts.max())
    width = -(-int((starts + counts).max()) // block_size)
    offsets = np.minimum(np.arange(num_queries), counts[:, None] - 1)
    padding = kept = None
    if (counts < num_queries).any():
        padding = (first + np.cumsum(counts) - counts)[:, None] + offsets
        kept = np.flatnonzero(np.arange(num_queries) < counts[:, None])
        padding = padding.ravel()
    return GroupPlan(
        first, first + int(counts.sum()), padding, kept, table[:, :width].ravel(), starts[:, None] + offsets
    )


def _transfer(arrays: Sequence[_Ints], device: torch.device) -> list[Tensor]:
    """All arrays on `device`, moved as one."""
    flat = torch.from_numpy(np.concatenate([array.ravel() for array in arrays])).to(device)
    pieces = flat.split([array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]
