"""The places of a step's tokens, computed on the host in arrays and moved to the device in one transfer.

Shapes: W works, N tokens, M tokens after which logits are computed, R rows of a group, Q queries a row.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from alignlab.models.sink_window import KeptTokens, size_of
from alignlab.rollout.embedded.block_pools import EXPIRED, Window, sink_blocks
from alignlab.rollout.embedded.paged_attention import RowGroup
from alignlab.rollout.embedded.scheduler import Work
from alignlab.transfer import to_device

_Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepTensors:
    """A planned step on the device; attributes as in `StepPlan`."""

    tokens: Tensor
    positions: Tensor
    slots: dict[Window, Tensor]
    logit_tokens: Tensor
    groups: list[RowGroup]
    state_slots: Tensor | None
    group_ends: Tensor | None
    run_lengths: tuple[int, ...]


@dataclass(frozen=True)
class GroupPlan:
    """A `RowGroup` on the host."""

    start: int
    end: int
    padding: _Ints | None
    unpadding: _Ints | None
    positions: _Ints
    blocks: dict[Window, _Ints]
    first_keys: dict[Window, _Ints]


@dataclass(frozen=True)
class StepPlan:
    """A step on the host.

    Attributes:
        tokens, positions: [N], token ids, and positions in their sequences.
        slots: [N], places in the cache, by the window of the layers.
        logit_tokens: [M], indices of the tokens after which logits are computed, in the order of the works given.
        groups: rows that attend together; they cover the tokens in order.
        state_slots: [2,W], where states are read and written, in the order of the tokens; None without states.
        group_ends: indices of the tokens that end a group of the cache; None where it has no groups.
        run_lengths: tokens of the works of more than one token, which come last.
    """

    tokens: _Ints
    positions: _Ints
    slots: dict[Window, _Ints]
    logit_tokens: _Ints
    groups: list[GroupPlan]
    state_slots: _Ints | None
    group_ends: _Ints | None
    run_lengths: tuple[int, ...]

    def on(self, device: torch.device, others: Sequence[Tensor] = ()) -> tuple[StepTensors, list[Tensor]]:
        """Return the step and other host tensors on `device`, moved by one copy."""
        own = _leaves(self)
        moved = iter(to_device([*map(torch.from_numpy, own), *others], device))
        tokens, positions, logit_tokens = (next(moved) for _ in range(3))
        slots = {window: next(moved) for window in self.slots}
        groups = [
            RowGroup(
                group.start, group.end,
                padding=None if group.padding is None else next(moved),
                unpadding=None if group.unpadding is None else next(moved),
                positions=next(moved),
                blocks={window: next(moved) for window in group.blocks},
                first_keys={window: next(moved) for window in group.first_keys},
            )
            for group in self.groups
        ]
        state_slots, group_ends = (
            None if array is None else next(moved) for array in (self.state_slots, self.group_ends)
        )
        step = StepTensors(tokens, positions, slots, logit_tokens, groups, state_slots, group_ends, self.run_lengths)
        return step, list(moved)


def _leaves(plan: StepPlan) -> list[_Ints]:
    """Return the arrays of a plan, in the order in which `StepPlan.on` takes them back."""
    arrays = [plan.tokens, plan.positions, plan.logit_tokens, *plan.slots.values()]
    for group in plan.groups:
        arrays += [array for array in (group.padding, group.unpadding) if array is not None]
        arrays += [group.positions, *group.blocks.values(), *group.first_keys.values()]
    return arrays + [array for array in (plan.state_slots, plan.group_ends) if array is not None]


def plan_step(
    work: Sequence[Work], block_size: int, windows: Collection[Window] = (None,), *, tokens_of_group: int = 1
) -> StepPlan:
    """Return the step that computes `work`; works of similar size lie together.

    Args:
        work: tokens of sequences.
        block_size: tokens in a block.
        windows: of the layers, each once.
        tokens_of_group: consecutive tokens that the cache rounds together; 1 for none.
    """
    order = sorted(range(len(work)), key=lambda index: _size_class(work[index]))
    ordered = [work[index] for index in order]
    counts = np.array([w.count for w in ordered])
    starts = np.array([w.start for w in ordered])
    tables = {window: block_table(ordered, block_size, window) for window in windows}
    dropped = {window: num_dropped(ordered, window) for window in windows}
    ends = np.cumsum(counts)
    rows = np.repeat(np.arange(len(ordered)), counts)
    positions = np.arange(len(rows)) + (starts - (ends - counts))[rows]
    slots = {
        window: _slots(table, rows, positions - dropped[window][rows], block_size) for window, table in tables.items()
    }
    tokens = np.fromiter(
        chain.from_iterable(w.sequence.token_ids[w.start : w.start + w.count] for w in ordered), np.int64, len(rows)
    )
    groups = _plan_groups(
        ordered, counts, starts, {window: (table, dropped[window]) for window, table in tables.items()}, block_size
    )
    ends_as_given = np.empty(len(order), np.int64)
    ends_as_given[order] = ends
    return StepPlan(
        tokens, positions, slots, logit_tokens(work, ends_as_given), groups, state_slots(ordered),
        None if tokens_of_group == 1 else np.flatnonzero((positions + 1) % tokens_of_group == 0),
        tuple(w.count for w in ordered if w.count > 1),
    )


def state_slots(work: Sequence[Work]) -> _Ints | None:
    """Return the slots where the states of each work are read and written, [2,W]; None without states."""
    uses = [w.states for w in work if w.states is not None]
    return np.ascontiguousarray(np.array(uses).T) if uses else None


def logit_tokens(work: Sequence[Work], ends: _Ints) -> _Ints:
    """Return the indices [M] of the last `num_logits` tokens of each work, whose tokens end at `ends` [W]."""
    counts = np.array([w.num_logits for w in work])
    return np.arange(counts.sum()) + np.repeat(ends - np.cumsum(counts), counts)


def _size_class(work: Work) -> tuple[int, int]:
    """Return the class of a work: within one, queries differ at most twofold and keys fourfold, to bound padding."""
    return (work.count - 1).bit_length(), (work.start + work.count).bit_length() // 2


def num_dropped(work: Sequence[Work], window: Window) -> _Ints:
    """Return how many tokens of each work's sequence a budget has dropped from layers of a window, [W]."""
    is_kept = isinstance(window, KeptTokens)
    return np.array([w.sequence.num_dropped if is_kept else 0 for w in work], np.int64)


def block_table(work: Sequence[Work], block_size: int, window: Window, filler: int = 0) -> _Ints:
    """Return the blocks that each work reads in layers of a window, [W, most blocks of a work], the rest filled up.

    Blocks that the window has left are the filler too.
    """
    dropped = num_dropped(work, window)
    num_blocks = [-(-(w.start + w.count - int(d)) // block_size) for w, d in zip(work, dropped, strict=True)]
    table = np.full((len(work), max(num_blocks)), filler, np.int64)
    for row, (w, count) in enumerate(zip(work, num_blocks, strict=True)):
        table[row, :count] = w.sequence.tables[window][:count]
    if window is not None:
        table[table == EXPIRED] = filler
    return table


def _slots(table: _Ints, rows: _Ints, places: _Ints, block_size: int) -> _Ints:
    """Return the slots [N] of tokens at places [N] of the sequences in rows [N] of a block table."""
    return table[rows, places // block_size] * block_size + places % block_size


def _plan_groups(
    work: Sequence[Work], counts: _Ints, starts: _Ints, tables: Mapping[Window, tuple[_Ints, _Ints]], block_size: int
) -> list[GroupPlan]:
    """Return a group of each run of works of one size class; arguments as in `_plan_group`, of all works."""
    groups: list[GroupPlan] = []
    row = first = 0
    for _, members in groupby(work, key=_size_class):
        rows = slice(row, row + len(list(members)))
        of_rows = {window: (table[rows], dropped[rows]) for window, (table, dropped) in tables.items()}
        groups.append(_plan_group(counts[rows], starts[rows], of_rows, first, block_size))
        row, first = rows.stop, groups[-1].end
    return groups


def _plan_group(
    counts: _Ints, starts: _Ints, tables: Mapping[Window, tuple[_Ints, _Ints]], first: int, block_size: int
) -> GroupPlan:
    """Return the group of consecutive rows with these query counts, first positions and blocks.

    Args:
        counts, starts: [R].
        tables: [R, blocks] and the tokens dropped from them [R], by window.
        first: index of the group's first token in the step.
        block_size: tokens in a block.
    """
    num_queries = int(counts.max())
    offsets = np.minimum(np.arange(num_queries), counts[:, None] - 1)
    padding = unpadding = None
    if (counts < num_queries).any():
        padding = (first + np.cumsum(counts) - counts)[:, None] + offsets
        unpadding = np.flatnonzero(np.arange(num_queries) < counts[:, None])
        padding = padding.ravel()
    blocks, first_keys = {}, {}
    for window, (table, dropped) in tables.items():
        blocks[window], left_out = _visible_blocks(table, starts, starts + counts - dropped, window, block_size)
        if left_out is not None:
            first_keys[window] = left_out * block_size
        if dropped.any():  # of what stayed, keys are numbered on as if they were the newest tokens
            first_keys[window] = dropped
    return GroupPlan(
        first, first + int(counts.sum()), padding, unpadding, starts[:, None] + offsets, blocks, first_keys
    )


def _visible_blocks(
    table: _Ints, starts: _Ints, ends: _Ints, window: Window, block_size: int
) -> tuple[_Ints, _Ints | None]:
    """Return the blocks [R * blocks a row] that rows read: those of sinks, and from the first that a row's first token
    sees.

    Args:
        table: [R, blocks].
        starts, ends: [R], positions of each row's first token, and after its last.

    Returns:
        The blocks; and of each row the number of blocks that it leaves out after the sinks' [R], None if none does.
    """
    last, num_sinks = -(-ends // block_size), sink_blocks(window, block_size)
    size = size_of(window)
    left_out = np.maximum((starts - (size or 0) + 1) // block_size - num_sinks, 0)
    if size is None or not left_out.any():
        return table[:, : int(last.max())].ravel(), None
    columns = np.arange(max(num_sinks, int((last - left_out).max())))
    columns = columns + np.where(columns < num_sinks, 0, left_out[:, None])
    columns = np.minimum(columns, table.shape[1] - 1)  # beyond a row's last block every key is hidden by its position
    return np.take_along_axis(table, columns, axis=1).ravel(), left_out
