"""The cut of packed attention into dense blocks of queries and keys. Pure bookkeeping on `Segments`.

A segment's queries see two runs of keys: its own, causally, and all of its prompt's. The first kind of block is batched
over segments of similar length. The second takes the queries of *all* completions of a prompt as one long query, so
that a prompt's keys are read where they are and never copied for each completion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alignlab.models.sink_window import Window, sees
from alignlab.transfer import to_device
from alignlab.types import Segments

MAX_SCORES = 1 << 17
"""Scores of one head in a block: bounds memory, and keeps what is computed in the cache."""
MAX_ROWS = 128
"""Queries in a block of a long segment: fewer skip more of the keys that causality hides."""
SPARE_SCORES = 1 << 12
"""Scores that may be wasted on padding to save a further block."""


@dataclass(frozen=True)
class Block:
    """A batch of b dense problems, M queries against S keys each.

    Attributes:
        queries: [b, M] token of each query; N, one past the last token, is padding.
        keys: [b, S] likewise; the padding is one past the last key.
        bias: [b or 1, M, S] float32, 0 where the query sees the key and -inf elsewhere; None if it sees all.
        first: the queries were in no block before.
    """

    queries: Tensor
    keys: Tensor
    bias: Tensor | None
    first: bool


Problem = tuple[Tensor, Tensor]
"""(queries, keys): the tokens that attend, and the tokens attended to."""
Sees = Callable[[Tensor, Tensor], Tensor]
"""(queries [b, M, 1], keys [b, 1, S]) -> [b, M, S], whether a query sees a key of its own problem."""


def attention_blocks(segments: Segments, window: Window) -> list[Block]:
    """Return the blocks that together hold every visible (query, key) pair once; cached on `segments`.

    Args:
        segments: the packed sequences.
        window: what a token sees; a number counts the token itself.
    """
    plans: dict[Window, list[Block]] = segments.__dict__.setdefault("_attention_blocks", {})
    if window not in plans:
        positions = segments.on_host.position_ids

        padding = (segments.num_tokens, segments.num_tokens)
        blocks = [
            make_block(batch, padding, lambda q, k: sees(window, positions[q], positions[k]), first=first)
            for first, problems in ((True, _own_keys(segments)), (False, _prompt_keys(segments)))
            for batch in batched_problems(list(problems))
        ]
        plans[window], _ = blocks_on(segments.device, blocks)
    return plans[window]


def blocks_on(
    device: torch.device, blocks: Sequence[Block], others: Sequence[Tensor] = ()
) -> tuple[list[Block], list[Tensor]]:
    """Return blocks of the host, and other host tensors, on `device`, moved by one copy."""
    tensors = [tensor for block in blocks for tensor in (block.queries, block.keys, block.bias) if tensor is not None]
    moved = iter(to_device([*tensors, *others], device))
    on_device = [
        replace(
            block, queries=next(moved), keys=next(moved), bias=None if block.bias is None else next(moved)
        )
        for block in blocks
    ]
    return on_device, list(moved)


def _own_keys(segments: Segments) -> Iterator[Problem]:
    """Yield each segment against itself; a long one in several runs of queries."""
    for start, length in zip(segments.starts, segments.lengths, strict=True):
        tokens = torch.arange(start, start + length)
        for queries in query_runs(tokens):
            yield queries, tokens[: int(queries[-1]) + 1 - start]


def query_runs(tokens: Tensor, num_before: int = 0) -> tuple[Tensor, ...]:
    """Return the tokens of a segment as queries: all at once, or in several runs where they are many.

    Args:
        num_before: tokens before the segment that they meet too.
    """
    length, num_keys = len(tokens), num_before + len(tokens)
    rows = length if length * num_keys <= MAX_SCORES // 4 else min(MAX_ROWS, max(1, MAX_SCORES // num_keys))
    return tokens.split(rows)


def _prompt_keys(segments: Segments) -> Iterator[Problem]:
    """Yield the queries of all completions of a prompt against the prompt."""
    children: dict[int, list[Tensor]] = {}
    for start, length, prefix in zip(segments.starts, segments.lengths, segments.prefixes, strict=True):
        if prefix >= 0:
            children.setdefault(prefix, []).append(torch.arange(start, start + length))
    for prefix, completions in children.items():
        keys = torch.arange(segments.lengths[prefix]) + segments.starts[prefix]
        for queries in torch.cat(completions).split(max(1, MAX_SCORES // len(keys))):
            yield queries, keys


def batched_problems(problems: list[Problem]) -> Iterator[list[Problem]]:
    """Yield batches of problems of similar size, within the limits on scores and padding."""
    batch: list[Problem] = []
    used = rows = columns = 0
    for queries, keys in sorted(problems, key=lambda problem: (len(problem[1]), len(problem[0]))):
        size = len(queries) * len(keys)
        padded = (len(batch) + 1) * max(rows, len(queries)) * max(columns, len(keys))
        if batch and (padded > MAX_SCORES or padded > 1.25 * (used + size) + SPARE_SCORES):
            yield batch
            batch, used, rows, columns = [], 0, 0, 0
        batch.append((queries, keys))
        used, rows, columns = used + size, max(rows, len(queries)), max(columns, len(keys))
    if batch:
        yield batch


def make_block(batch: list[Problem], padding: tuple[int, int], sees: Sees, *, first: bool) -> Block:
    """Return a padded batch of problems, on the host.

    Args:
        padding: one past the last query, and one past the last key.
        first: see `Block`.
    """
    queries = torch.nn.utils.rnn.pad_sequence([q for q, _ in batch], batch_first=True, padding_value=padding[0])
    keys = torch.nn.utils.rnn.pad_sequence([k for _, k in batch], batch_first=True, padding_value=padding[1])
    is_no_query, is_no_key = queries == padding[0], keys == padding[1]
    visible = sees(queries.masked_fill(is_no_query, 0)[:, :, None], keys.masked_fill(is_no_key, 0)[:, None, :])
    visible = (visible & ~is_no_key[:, None, :]) | is_no_query[:, :, None]
    if bool((visible == visible[:1]).all()):
        visible = visible[:1]
    bias = None
    if not bool(visible.all()):
        bias = torch.zeros(visible.shape).masked_fill_(~visible, -torch.inf)
    return Block(queries, keys, bias, first)
