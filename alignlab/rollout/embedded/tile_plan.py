"""The places of a step's tokens on a GPU, where attention reads the cache in place: rows, tiles and visited blocks.

Sequences that continue by one token are rows, one query each; the others are cut into tiles of consecutive queries.
Few shapes exist: rows and the width of block tables are filled up to size classes, by rows that compute a token of
their own in a block that nothing else reads.

Shapes: W works, N tokens with those of added rows, M tokens after which logits are computed; T, Q, P and the tensors of
a group as in `paged_flex`, with its W for the width of the tables.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from alignlab.models.paged_flex import TILE, Tiles, VisitedBlocks
from alignlab.models.sink_window import KeptTokens, SinkWindow
from alignlab.rollout.embedded.block_pools import Window, first_visible
from alignlab.rollout.embedded.scheduler import Work
from alignlab.rollout.embedded.step_plan import block_table, logit_tokens, state_slots
from alignlab.transfer import to_device

_GROWTH = 4  # of size classes: matrix products of up to some hundred rows cost what reading the weights costs
_Ints = NDArray[np.int64]


class TileGroup(NamedTuple):
    """Tiles that attend together; their tokens are consecutive.

    Attributes:
        padding: [T*Q] int64, the step's token that stands at each query; a short tile repeats its last token. None for
            rows.
        unpadding: [tokens of the group] int64, the place of each token among the T*Q queries; None for rows.
        tiles: the queries and their sequences' blocks, by the window of the layers.
        visited: the blocks to visit, likewise.
    """

    padding: Tensor | None
    unpadding: Tensor | None
    tiles: dict[Window, Tiles]
    visited: dict[Window, VisitedBlocks]


class TileStep(NamedTuple):
    """A step, on the host or on a device.

    Attributes:
        tokens, positions: [N] int64, token ids, and positions in their sequences.
        slots: [N] int64, places in the cache, by the window of the layers.
        logit_tokens: [M] int64, indices of the tokens after which logits are computed, in the order of the works given.
        rows: the sequences that continue by one token, whose tokens come first; None if there are none.
        chunks: the other tokens; None if there are none.
        state_slots: [2,W] int64, where states are read and written, with those of added rows; None without states.
    """

    tokens: Tensor
    positions: Tensor
    slots: dict[Window, Tensor]
    logit_tokens: Tensor
    rows: TileGroup | None
    chunks: TileGroup | None
    state_slots: Tensor | None

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in an order that equal shapes share."""
        return [leaf for leaf in tree_flatten(self)[0] if leaf is not None]

    def with_tensors(self, tensors: Sequence[Tensor]) -> TileStep:
        """Return the step with other tensors in the place of its own."""
        leaves, structure = tree_flatten(self)
        others = iter(tensors)
        step: TileStep = tree_unflatten([leaf if leaf is None else next(others) for leaf in leaves], structure)
        return step

    def on(self, device: torch.device, others: Sequence[Tensor] = ()) -> tuple[TileStep, list[Tensor]]:
        """Return the step and other host tensors on `device`, moved by one copy."""
        own = self.tensors()
        moved = to_device([*own, *others], device)
        return self.with_tensors(moved[: len(own)]), moved[len(own) :]


def size_class(count: int, most: int | None = None) -> int:
    """Return the smallest size class that holds `count`: a power of 4 from 4 on, or `most`, if given, for the last."""
    size = _GROWTH
    while size < count:
        size *= _GROWTH
    return size if most is None else max(count, min(size, most))


def plan_tiles(
    work: Sequence[Work], *, block_size: int, num_blocks: Mapping[Window, int], max_rows: int, num_slots: int = 0
) -> TileStep:
    """Return the step that computes `work`, on the host.

    Args:
        work: tokens of sequences.
        block_size: tokens in a block.
        num_blocks: blocks that sequences use, by the window of the layers; one more, the last, is for added rows.
        max_rows: most sequences that run together.
        num_slots: slots that sequences' states use; one more, the last, is for added rows.
    """
    order = sorted(range(len(work)), key=lambda index: work[index].count > 1)
    ordered = [work[index] for index in order]
    counts, starts = (np.array([getattr(w, name) for w in ordered]) for name in ("count", "start"))
    num_rows = int((counts == 1).sum())
    added = size_class(num_rows, max_rows) - num_rows if num_rows else 0
    tables = {w: _table(ordered, block_size, w, count, num_rows, added) for w, count in num_blocks.items()}
    # The added rows, one token each, stand between the rows and the chunks.
    counts, starts = (np.insert(x, num_rows, np.full(added, value)) for x, value in ((counts, 1), (starts, 0)))
    ends = np.cumsum(counts)
    owners = np.repeat(np.arange(len(counts)), counts)
    positions = np.arange(len(owners)) + (starts - (ends - counts))[owners]
    tokens = np.zeros(len(owners), np.int64)
    is_own = np.ones(len(owners), bool)
    is_own[num_rows : num_rows + added] = False
    tokens[is_own] = list(
        chain.from_iterable(w.sequence.token_ids[w.start : w.start + w.count] for w in ordered)
    )
    ends_as_given = np.empty(len(order), np.int64)
    ends_as_given[order] = np.delete(ends, np.s_[num_rows : num_rows + added])
    places, offsets = positions // block_size, positions % block_size
    slots = {w: torch.from_numpy(table[owners, places] * block_size + offsets) for w, (table, _) in tables.items()}
    groups = _groups(counts, starts, ends, tables, num_rows + added, block_size)
    return TileStep(
        torch.from_numpy(tokens), torch.from_numpy(positions), slots,
        torch.from_numpy(logit_tokens(work, ends_as_given)), *groups,
        _filled_slots(state_slots(ordered), num_rows, added, num_slots),
    )


def _filled_slots(slots: _Ints | None, num_rows: int, added: int, filler: int) -> Tensor | None:
    """Return the slots [2,W] with those of rows that are added after the first `num_rows`."""
    return None if slots is None else torch.from_numpy(np.insert(slots, [num_rows] * added, filler, axis=1))


def _table(
    work: Sequence[Work], block_size: int, window: Window, num_blocks: int, num_rows: int, added: int
) -> tuple[_Ints, Tensor]:
    """Return the blocks of works in layers of a window, [W + added, width], and the place of each block in its
    sequences, [num_blocks + 1] int32.

    Args:
        num_blocks: blocks that sequences use; the one after them fills up.
        num_rows, added: rows that are added stand after the first `num_rows`.
    """
    table = _filled(block_table(work, block_size, window, num_blocks), num_blocks)
    place_of_block = np.zeros(num_blocks + 1, np.int64)
    for row, w in enumerate(work):
        first, end = first_visible(w.start, window, block_size), -(-(w.start + w.count) // block_size)
        place_of_block[table[row, first:end]] = np.arange(first, end)
    table = np.insert(table, num_rows, np.full((added, table.shape[1]), num_blocks), axis=0)
    return table, _int32(place_of_block)


def _filled(table: _Ints, filler: int) -> _Ints:
    """Return a table [W, blocks], filled up to a size class of columns."""
    missing = size_class(table.shape[1]) - table.shape[1]
    return np.pad(table, ((0, 0), (0, missing)), constant_values=filler)


def _groups(
    counts: _Ints, starts: _Ints, ends: _Ints, tables: Mapping[Window, tuple[_Ints, Tensor]], num_rows: int,
    block_size: int,
) -> tuple[TileGroup | None, TileGroup | None]:
    """Return rows and chunks: the first `num_rows` works have one token each."""
    rows = chunks = None
    if num_rows:
        of_rows = {window: (table[:num_rows], places) for window, (table, places) in tables.items()}
        rows = _group(starts[:num_rows, None], of_rows, block_size, split=False)
    if num_rows < len(counts):
        long = slice(num_rows, None)
        num_tiles = -(-counts[long] // TILE)
        owner = np.repeat(np.arange(num_rows, len(counts)), num_tiles)
        number = np.arange(len(owner)) - np.repeat(np.cumsum(num_tiles) - num_tiles, num_tiles)  # in its chunk
        offset = number * TILE
        held = np.minimum(counts[owner] - offset, TILE)
        queries = np.minimum(np.arange(TILE), held[:, None] - 1)
        tokens = (ends - counts)[owner][:, None] + offset[:, None] + queries
        positions = (starts[owner] + offset)[:, None] + queries
        of_tiles = {window: (table[owner], places) for window, (table, places) in tables.items()}
        chunks = _group(positions, of_tiles, block_size, split=True)
        chunks = chunks._replace(
            padding=torch.from_numpy(tokens.ravel()),
            unpadding=torch.from_numpy(np.flatnonzero(np.arange(TILE) < held[:, None])),
        )
    return rows, chunks


def _group(
    positions: _Ints, tables: Mapping[Window, tuple[_Ints, Tensor]], block_size: int, *, split: bool
) -> TileGroup:
    """Return tiles with queries at rising `positions` [T,Q], the last ones repeated, and blocks [T, width]."""
    tiles = {w: Tiles(_int32(positions), _int32(table), places) for w, (table, places) in tables.items()}
    visited: dict[Window, VisitedBlocks] = {}
    for window, (table, _) in tables.items():
        assert not isinstance(window, SinkWindow | KeptTokens), "a cache that drops tokens is gathered"
        visited[window] = visited_blocks(positions, table, block_size, window, split=split)
    return TileGroup(None, None, tiles, visited)


def visited_blocks(
    positions: _Ints, table: _Ints, block_size: int, window: int | None, *, split: bool
) -> VisitedBlocks:
    """Return the blocks that tiles read.

    Args:
        positions: [T,Q], rising.
        table: [T, width].
        block_size: tokens in a block.
        window: a query sees this many tokens, itself included; None sees all.
        split: list the blocks of which all queries see all keys apart, so that the kernel leaves out their masks. Not
            for rows: with such a list torch's kernel for decoding shares out the slots of the whole cache, and one
            program reads all of a row.
    """
    first, last = positions[:, :1], positions[:, -1:]
    begin = np.arange(table.shape[1]) * block_size
    end = begin + block_size - 1
    is_seen, is_full = begin <= last, end <= first
    if window is not None:
        is_seen, is_full = is_seen & (end > first - window), is_full & (begin > last - window)
    first_seen = None if window is None else _int32(positions - window + 1)
    if not split:
        return VisitedBlocks(*_listed(is_seen, table), first_seen=first_seen)
    return VisitedBlocks(*_listed(is_seen & ~is_full, table), *_listed(is_full, table), first_seen)


def _listed(chosen: NDArray[np.bool_], table: _Ints) -> tuple[Tensor, Tensor]:
    """Return the number of blocks chosen in each row [T,1,1], and the blocks, those chosen first, [T,1,1,width]."""
    columns = np.argsort(~chosen, axis=1, kind="stable")
    blocks = np.take_along_axis(table, columns, axis=1)
    return _int32(chosen.sum(1)[:, None, None]), _int32(blocks[:, None, None])


def _int32(array: NDArray[np.int64]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int32))
