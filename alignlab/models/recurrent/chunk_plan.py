"""The chunks of packed sequences: a tree, because completions go on from their prompt's last chunk.

Shapes: N tokens, M chunks of C tokens, S segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from alignlab.transfer import to_device
from alignlab.types import Segments

MAX_CHUNK = 64
"""Tokens of a chunk: more keep fewer states and cost more products; float32 is as exact with 16 as with 128."""
MIN_CHUNK = 16


@dataclass(frozen=True)
class ChunkPlan:
    """Chunks sorted by their distance from the beginning of their sequence: those of one rank run together.

    Attributes:
        tokens: [M,C] token at each place of a chunk; N, one past the last token, is padding.
        parents: [M] the chunk before each, in its segment or its prompt; M for the first chunk of a root.
        segments: [M] the segment of each chunk.
        ranks: (first, end) of the chunks of each rank, in order; parents are of the rank before.
        places: [N] place of each token among the M * C.
        last: [S] each segment's last chunk.
    """

    tokens: Tensor
    parents: Tensor
    segments: Tensor
    ranks: tuple[tuple[int, int], ...]
    places: Tensor
    last: Tensor

    @property
    def num_chunks(self) -> int:
        return int(self.tokens.shape[0])

    def cut(self, flat: Tensor) -> Tensor:
        """Return what tokens have, [N,H,...], by chunks, [M,H,C,...], zero at padding."""
        padded = torch.cat((flat, flat.new_zeros(1, *flat.shape[1:])))
        chunks = padded.index_select(0, self.tokens.flatten()).view(*self.tokens.shape, *flat.shape[1:])
        return chunks.transpose(1, 2).contiguous()

    def joined(self, chunks: Tensor) -> Tensor:
        """Return what chunks have, [M,H,C,...], by tokens, [N,H,...]."""
        return chunks.transpose(1, 2).flatten(0, 1).index_select(0, self.places)


def chunk_plan(segments: Segments) -> ChunkPlan:
    """Return the chunks of packed sequences, cached on `segments`."""
    plan: ChunkPlan | None = segments.__dict__.get("_chunk_plan")
    if plan is None:
        plan = segments.__dict__["_chunk_plan"] = _plan(segments, _chunk_size(max(segments.lengths)))
    return plan


def _chunk_size(longest: int) -> int:
    """Return the tokens of a chunk: no more than the next power of two of the longest segment."""
    return min(MAX_CHUNK, max(MIN_CHUNK, 1 << (longest - 1).bit_length()))


def _plan(segments: Segments, size: int) -> ChunkPlan:
    ranks: list[int] = []
    parents: list[int] = []
    owners: list[int] = []
    last: list[int] = []
    tokens = []
    for index, (start, length, prefix) in enumerate(
        zip(segments.starts, segments.lengths, segments.prefixes, strict=True)
    ):
        parent = last[prefix] if prefix >= 0 else -1
        for first in range(start, start + length, size):
            ranks.append(ranks[parent] + 1 if parent >= 0 else 0)
            parents.append(parent)
            owners.append(index)
            chunk = np.arange(first, first + size)
            tokens.append(np.where(chunk < start + length, chunk, segments.num_tokens))
            parent = len(ranks) - 1
        last.append(parent)
    order = np.argsort(np.array(ranks), kind="stable")
    place = np.empty(len(order) + 1, np.int64)
    place[order], place[-1] = np.arange(len(order)), len(order)
    ends = np.cumsum(np.bincount(np.array(ranks))).tolist()
    table = np.stack(tokens)[order]
    places = np.empty(segments.num_tokens, np.int64)
    is_token = table.ravel() < segments.num_tokens
    places[table.ravel()[is_token]] = np.flatnonzero(is_token)
    arrays = (table, place[np.array(parents)[order]], np.array(owners)[order], places, place[np.array(last)])
    on_device = to_device([torch.from_numpy(array) for array in arrays], segments.device)
    tensors = dict(zip(("tokens", "parents", "segments", "places", "last"), on_device, strict=True))
    return ChunkPlan(**tensors, ranks=tuple(zip([0, *ends[:-1]], ends, strict=True)))
