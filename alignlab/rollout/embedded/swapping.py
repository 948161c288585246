"""Entries of pre-empted sequences on the host, from where they are copied back instead of being computed again.

A sequence that gives way is copied as it is: whole blocks of every layer, rounded or not, the experts that were chosen,
and the states of recurrent layers. All of it goes in one copy, from the GPU to pinned memory without a wait of the
host, and comes back in one for each such copy that it needs. Published blocks, whose content is final, are kept once
for all sequences that share them; those that nobody has taken over meanwhile are used where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alignlab.rollout.embedded.block_pools import EXPIRED, BlockPools, Tables, Window
from alignlab.rollout.embedded.paged_cache import PagedCache
from alignlab.rollout.embedded.sequence import TokenSequence
from alignlab.rollout.embedded.state_cache import StateCache
from alignlab.rollout.embedded.state_slots import StateSlots
from alignlab.transfer import to_device

_STATES = "states"
Area = Window | str
"""A part of what is kept: the blocks of a window, or the slots of states."""


@dataclass(eq=False)
class Parcel:
    """The host memory of one copy.

    Attributes:
        memory: [bytes] uint8, pinned where the cache is on a GPU.
        num_rows: blocks and slots in it that sequences still need.
    """

    memory: Tensor
    num_rows: int = 0


@dataclass(eq=False)
class HostRow:
    """A block, or the slot of a state, on the host.

    Attributes:
        start: of its bytes in the parcel.
        key: window, block and stamp, under which others find it; None where it is not published.
        num_users: sequences that need it.
    """

    parcel: Parcel
    start: int
    key: tuple[Window, int, int] | None = None
    num_users: int = 0


@dataclass(frozen=True)
class SwappedOut:
    """A sequence on the host.

    Attributes:
        tables: of each pool, the blocks of computed tokens; None for those that a window has left.
        state: of recurrent layers; None where there are none.
    """

    tables: dict[Window, list[HostRow | None]]
    state: HostRow | None

    def rows(self) -> Iterator[HostRow]:
        """Yield all rows."""
        yield from (row for table in self.tables.values() for row in table if row is not None)
        if self.state is not None:
            yield self.state


class SwapStore:
    """Keeps pre-empted sequences on the host, in memory of at most a size.

    Args:
        cache: what layers keep of tokens.
        states: what layers keep of sequences.
        max_bytes: of all that is kept at one time.

    Attributes:
        num_out, num_back: sequences that were copied to the host, and back, so far.
        bytes_out, bytes_back: of these copies.
    """

    def __init__(self, cache: PagedCache, states: StateCache, max_bytes: int) -> None:
        self._cache = cache
        self._states = states
        self._max_bytes = max_bytes
        self._sequences: dict[TokenSequence, SwappedOut] = {}
        self._rows: dict[tuple[Window, int, int], HostRow] = {}
        self.held_bytes = 0
        self.num_out = self.num_back = self.bytes_out = self.bytes_back = 0

    def __contains__(self, sequence: TokenSequence) -> bool:
        return sequence in self._sequences

    def metrics(self) -> dict[str, float]:
        """Return the numbers of sequences and of bytes that were copied, so far."""
        return {
            "engine/swapped_out": float(self.num_out), "engine/swapped_in": float(self.num_back),
            "engine/swapped_out_bytes": float(self.bytes_out), "engine/swapped_in_bytes": float(self.bytes_back),
        }

    def take_out(self, sequence: TokenSequence, pools: BlockPools) -> bool:
        """Copy what is computed of a running sequence to the host; return False if there is no room, or nothing yet.

        Its blocks and its slot stay its own until the scheduler frees them.
        """
        count = pools.blocks_for(sequence.num_computed)
        if not count:
            return False
        parcel = Parcel(torch.empty(0, dtype=torch.uint8))
        new: dict[Area, list[tuple[int, HostRow]]] = {}
        tables: dict[Window, list[HostRow | None]] = {}
        for window, table in sequence.tables.items():
            tables[window], to_copy = self._rows_of(table[:count], window, pools, parcel)
            if to_copy:
                new[window] = to_copy
        state = None
        if sequence.state is not None:
            state = HostRow(parcel, 0)
            new[_STATES] = [(sequence.state, state)]
        if not self._fill(parcel, new):
            return False
        self._sequences[sequence] = swapped = SwappedOut(tables, state)
        for row in swapped.rows():
            row.num_users += 1
        self.num_out += 1
        return True

    def _rows_of(
        self, blocks: Sequence[int], window: Window, pools: BlockPools, parcel: Parcel
    ) -> tuple[list[HostRow | None], list[tuple[int, HostRow]]]:
        """Return the rows of a sequence's blocks in a pool, those of published blocks where the host has them already.

        Args:
            parcel: of new rows.

        Returns:
            A row of each block, None for those that a window has left; and (block, row) of those to be copied.
        """
        manager = pools.managers[window]
        rows: list[HostRow | None] = []
        to_copy: list[tuple[int, HostRow]] = []
        for block in blocks:
            if block == EXPIRED:
                rows.append(None)
                continue
            key = (window, block, manager.stamp(block)) if manager.is_published(block) else None
            row = None if key is None else self._rows.get(key)
            if row is None:
                row = HostRow(parcel, 0, key)
                to_copy.append((block, row))
            rows.append(row)
        return rows, to_copy

    def find(self, sequence: TokenSequence, pools: BlockPools) -> dict[Window, int]:
        """Give a sequence those of its blocks that still lie in the cache as they were.

        Its tables have `EXPIRED` in the places of the others.

        Returns:
            By window, how many blocks must be copied back.
        """
        tables: Tables = {}
        absent: dict[Window, int] = {}
        for window, rows in self._sequences[sequence].tables.items():
            manager = pools.managers[window]
            tables[window] = [
                row.key[1] if row is not None and row.key is not None and manager.take_unchanged(*row.key[1:])
                else EXPIRED
                for row in rows
            ]
            absent[window] = sum(
                row is not None and block == EXPIRED for row, block in zip(rows, tables[window], strict=True)
            )
        sequence.tables = tables
        return absent

    def bring_back(self, sequence: TokenSequence, pools: BlockPools, slots: StateSlots | None) -> None:
        """Copy what is missing of a sequence back, into blocks and a slot that are allocated here, and forget it.

        Args:
            sequence: with the tables that `find` returned.
        """
        swapped = self._sequences[sequence]
        places: dict[Area, list[tuple[int, HostRow]]] = {}
        for window, rows in swapped.tables.items():
            table = sequence.tables[window]
            for index, row in enumerate(rows):
                if row is not None and table[index] == EXPIRED:
                    table[index] = pools.managers[window].allocate()
                    places.setdefault(window, []).append((table[index], row))
        if swapped.state is not None:
            assert slots is not None
            places[_STATES] = [(slots.allocate(sequence), swapped.state)]
        self._write(places)
        self.num_back += 1
        self.forget(sequence)

    def forget(self, sequence: TokenSequence) -> None:
        """Free what the host keeps of a sequence, if it keeps anything."""
        swapped = self._sequences.pop(sequence, None)
        for row in () if swapped is None else swapped.rows():
            row.num_users -= 1
            if not row.num_users:
                if row.key is not None:
                    del self._rows[row.key]
                row.parcel.num_rows -= 1
                if not row.parcel.num_rows:
                    self.held_bytes -= row.parcel.memory.nbytes

    def clear(self) -> None:
        """Free everything."""
        self._sequences, self._rows, self.held_bytes = {}, {}, 0

    def _fill(self, parcel: Parcel, new: Mapping[Area, Sequence[tuple[int, HostRow]]]) -> bool:
        """Copy blocks and slots into a parcel of their size, at the places that their rows get; False without room."""
        sizes = {area: self._row_bytes(area) for area in new}
        num_bytes = sum(sizes[area] * len(rows) for area, rows in new.items())
        if self.held_bytes + num_bytes > self._max_bytes:
            return False
        start = 0
        for area, rows in new.items():
            for _, row in rows:
                row.start, start = start, start + sizes[area]
                parcel.num_rows += 1
                if row.key is not None:
                    self._rows[row.key] = row
        if num_bytes:  # a model with states alone keeps nothing in blocks
            parcel.memory = self._gathered({area: rows for area, rows in new.items() if sizes[area]}, num_bytes)
        self.held_bytes += num_bytes
        self.bytes_out += num_bytes
        return True

    def _gathered(self, new: Mapping[Area, Sequence[tuple[int, HostRow]]], num_bytes: int) -> Tensor:
        """Return blocks and slots one after the other, [num_bytes] on the host."""
        device = self._device(new)
        indices = to_device([torch.tensor([place for place, _ in rows]) for rows in new.values()], device)
        memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        start = 0
        for area, index in zip(new, indices, strict=True):
            tensors = [_bytes(tensor).index_select(0, index) for tensor in self._tensors(area)]
            part = memory[start : start + sum(tensor.numel() for tensor in tensors)]
            torch.cat(tensors, dim=1, out=part.view(len(index), -1))
            start += part.numel()
        if device.type != "cuda":
            return memory
        host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        return host.copy_(memory, non_blocking=True)

    def _write(self, places: Mapping[Area, Sequence[tuple[int, HostRow]]]) -> None:
        """Copy rows to their places: of each parcel the part from the first to the last of them, by one copy."""
        places = {area: rows for area, rows in places.items() if self._row_bytes(area)}
        if not places:
            return
        device, spans = self._device(places), self._spans(places)
        moved = {
            parcel: parcel.memory[first:end].to(device, non_blocking=True) for parcel, (first, end) in spans.items()
        }
        self.bytes_back += sum(memory.nbytes for memory in moved.values())
        indices = to_device([torch.tensor([place for place, _ in rows]) for rows in places.values()], device)
        for (area, rows), index in zip(places.items(), indices, strict=True):
            size = self._row_bytes(area)
            pieces = [(moved[row.parcel], row.start - spans[row.parcel][0]) for _, row in rows]
            self._put(area, index, torch.stack([memory[start : start + size] for memory, start in pieces]))

    def _spans(self, places: Mapping[Area, Sequence[tuple[int, HostRow]]]) -> dict[Parcel, tuple[int, int]]:
        """Return where the first of the rows begins in each parcel, and where the last of them ends."""
        spans: dict[Parcel, tuple[int, int]] = {}
        for area, rows in places.items():
            size = self._row_bytes(area)
            for _, row in rows:
                first, end = spans.get(row.parcel, (row.start, 0))
                spans[row.parcel] = min(first, row.start), max(end, row.start + size)
        return spans

    def _put(self, area: Area, index: Tensor, rows: Tensor) -> None:
        """Write rows [n, bytes of a row] to the places `index` [n] of an area."""
        tensors = self._tensors(area)
        parts = rows.split([tensor[0].nbytes for tensor in tensors], dim=1)
        for tensor, part in zip(tensors, parts, strict=True):
            _bytes(tensor).index_copy_(0, index, part)

    def _tensors(self, area: Area) -> list[Tensor]:
        """Return all that is kept in an area, [blocks or slots, numbers]."""
        return self._states.tensors() if isinstance(area, str) else self._cache.tensors_of(area)

    def _row_bytes(self, area: Area) -> int:
        """Return the bytes of a block, or of a slot."""
        return sum(tensor[0].nbytes for tensor in self._tensors(area))

    def _device(self, areas: Iterable[Area]) -> torch.device:
        return next(tensor.device for area in areas for tensor in self._tensors(area))


def _bytes(tensor: Tensor) -> Tensor:
    """Return a tensor [rows, numbers] as bytes of the same memory."""
    return tensor.view(torch.uint8)
