"""Attention over a paged cache on a GPU, by torch's FlexAttention: keys and values are read where they lie.

The queries of a step are cut into tiles, each of consecutive tokens of one sequence. A tile names the blocks of the
cache that it reads, and the kernel visits those alone, so that no keys are gathered and what is planned is linear in
blocks. A block holds the same tokens for every sequence that reads it, so its place in a sequence belongs to the block.

Shapes: T tiles, Q queries of a tile, W most blocks that a tile may name, P blocks of the cache, S slots (P times the
tokens of a block), H heads, K kv heads, D size of a query's or key's head, V size of a value's head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from alignlab.models.flex_attention import BLOCK, Rule, attend_with_sinks, soft_capped

ScoreRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
TILE = BLOCK
"""Queries of a tile, where tiles have several: the rows of the largest kernel."""
_RECOMPILE_LIMIT = 64
"""Kernels of one set of constants: one for each number of decoding rows, and two for tiles."""


class Tiles(NamedTuple):
    """The queries of tiles, and the blocks in which their sequences lie.

    Attributes:
        positions: [T,Q] int32, position of each query in its sequence.
        table: [T,W] int32, the blocks of each tile's sequence, in order; filled up with any block.
        place_of_block: [P] int32, the place of each block in its sequences' tables; any place for a block not in use.
    """

    positions: Tensor
    table: Tensor
    place_of_block: Tensor


class VisitedBlocks(NamedTuple):
    """The blocks whose keys the queries of each tile see, for layers with one window.

    Attributes:
        num_partial, num_full: [T,1,1] int32, blocks of which not every query sees every key, and others. No `num_full`
            if all blocks are listed as partial.
        partial, full: [T,1,1,W] int32, these blocks, the first ones of each row.
        first_seen: [T,Q] int32, first position in each query's window; None without a window.
    """

    num_partial: Tensor
    partial: Tensor
    num_full: Tensor | None = None
    full: Tensor | None = None
    first_seen: Tensor | None = None


def flex_paged_attention(
    query: Tensor, key: Tensor, value: Tensor, tiles: Tiles, visited: VisitedBlocks,
    *, block_size: int, scaling: float, softcap: float | None, sinks: Tensor | None = None,
) -> Tensor:
    """Return attention of each query to the cached tokens of its sequence up to itself.

    Args:
        query: [T,H,Q,D], positions already applied; Q is 1 where sequences are decoded, otherwise `TILE`.
        key, value: [S,K,D], [S,K,V], the cache.
        tiles, visited: where queries and their keys lie.
        block_size: tokens in a block.
        scaling: factor of the scores, before the cap.
        softcap: scores become cap * tanh(score / cap).
        sinks: [H], a logit of each head that joins the softmax, uncapped, and adds nothing to the output.

    Returns:
        [T,H,Q,V]

    Raises:
        FailOnRecompileLimitHit: torch would compile more often than is ever needed.
    """
    attend = _compiled_flex(visited.first_seen is not None, softcap, block_size, scaling)
    return attend(query, key.transpose(0, 1)[None], value.transpose(0, 1)[None], sinks, *tiles, *visited)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, positions: Tensor, table: Tensor,
    place_of_block: Tensor, num_partial: Tensor, partial: Tensor, num_full: Tensor | None, full: Tensor | None,
    first_seen: Tensor | None,
    *, block_size: int, scaling: float, score_mod: ScoreRule | None, flex: Callable[..., Any] = flex_attention,
) -> Tensor:
    """Return [T,H,Q,V] of query [T,H,Q,D], key [1,K,S,D] and value [1,K,S,V]; the mask is made while this is compiled,
    so that the number of slots is none of the kernel's constants."""
    mask = BlockMask(
        (query.shape[2], key.shape[2]), num_partial, partial, num_full, full, None, None, None, None,
        BLOCK_SIZE=(TILE, block_size), mask_mod=visibility(positions, table, place_of_block, first_seen, block_size),
    )
    # The kernel reads tiles of at most 128 keys, which must divide a block.
    options: dict[str, Any] = {"BLOCK_N": block_size} if block_size < BLOCK else {}
    shared = query.shape[1] // key.shape[1]
    if query.shape[2] == 1 and shared & (shared - 1):
        options["BLOCK_M"] = 16  # the kernel for decoding takes powers of two alone, and the other computes 128 rows
    return attend_with_sinks(
        flex, query, key, value, sinks, score_mod=score_mod, block_mask=mask, scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1], kernel_options=options,
    )


def visibility(
    positions: Tensor, table: Tensor, place_of_block: Tensor, first_seen: Tensor | None, block_size: int
) -> Rule:
    """Return FlexAttention's `mask_mod`: True where a tile's query sees a slot. Arguments as in `Tiles`.

    It is complete on its own: a slot in a block that is not the sequence's is hidden, though a kernel never visits one.
    """

    def rule(tile: Tensor, head: Tensor, q: Tensor, slot: Tensor) -> Tensor:
        block = slot // block_size
        place = place_of_block[block]
        position = place * block_size + slot % block_size
        seen = (table[tile, place] == block) & (position <= positions[tile, q])
        return seen if first_seen is None else seen & (position >= first_seen[tile, q])

    return rule


@cache
def _compiled_flex(
    has_window: bool, softcap: float | None, block_size: int, scaling: float
) -> Callable[..., Tensor]:
    """Return `_attend`, compiled for these constants.

    A kernel's constants are also the number of tiles with one query: torch's kernel for decoding, which shares the keys
    of a row among its programs, needs it. All sizes of the cache and of the tables may change.
    """
    score_mod = None if softcap is None else soft_capped(softcap)
    compiled: Callable[..., Tensor] = torch.compile(  # type: ignore[call-overload]  # stubs miss two arguments
        partial(_attend, block_size=block_size, scaling=scaling, score_mod=score_mod), fullgraph=True,
        dynamic=True, recompile_limit=_RECOMPILE_LIMIT, isolate_recompiles=True,
    )
    from torch._dynamo import config, mark_static  # slow to import, and of use on a GPU alone
    from torch.fx.experimental import _config as shapes

    patch_shapes: Any = shapes.patch  # type: ignore[attr-defined]  # put there by torch when the module is loaded

    def attend(query: Tensor, *rest: Tensor | None) -> Tensor:
        mark_static(query, 2)
        if query.shape[2] == 1:
            mark_static(query, 0)
        # Numbers are constants, and sizes that happen to be equal today are not taken for one size.
        with config.patch(specialize_int=True, specialize_float=True), patch_shapes(use_duck_shape=False):
            return compiled(query, *rest)

    return attend
