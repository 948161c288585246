"""A stand-in for the compiled FlexAttention, which has no kernel for tensors of a pretended GPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxOutput, AuxRequest
from torch.nn.functional import scaled_dot_product_attention

from alignlab.models import paged_flex
from alignlab.models.flex_attention import flex_packed_attention, soft_capped
from alignlab.types import Segments


def dense_flex(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool,
    return_aux: AuxRequest | None = None,
) -> Any:
    """Return what FlexAttention returns, by a dense mask made from the block mask's rule."""
    queries, keys = (torch.arange(x.shape[2], device=query.device) for x in (query, key))
    zero = torch.zeros((), dtype=torch.long, device=query.device)
    mask = block_mask.mask_mod(zero, zero, queries[:, None], keys[None, :])
    if score_mod is None and return_aux is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)
    return _dense(query, key, value, mask, score_mod=score_mod, scale=scale, with_sums=return_aux is not None)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, *, score_mod: Any, scale: float, with_sums: bool
) -> Any:
    """Return attention [T,H,Q,V] to visible keys, each kv head repeated for the query heads that share it; with it the
    logarithm of the softmax's sums [T,H,Q], if that is asked for."""
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    scores = query.float() @ key.float().transpose(2, 3) * scale
    if score_mod is not None:
        scores = score_mod(scores, None, None, None, None)
    scores = scores.masked_fill(~visible, -torch.inf)
    out = scores.softmax(-1).to(value.dtype) @ value
    return (out, AuxOutput(lse=scores.logsumexp(-1))) if with_sums else out


def as_on_a_gpu(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments,
    *, scaling: float, sliding_window: int | None = None, softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return `packed_attention` on the CPU by the operations that it has on a pretended GPU."""
    return flex_packed_attention(
        query, key, value, segments,
        scaling=scaling, sliding_window=sliding_window, softcap=softcap, sinks=sinks, flex=dense_flex,
    )


def paged_stand_in(has_window: bool, softcap: float | None, block_size: int, scaling: float) -> Callable[..., Tensor]:
    """Return what `paged_flex._compiled_flex` returns, with a dense attention in place of the kernel."""
    score_mod = None if softcap is None else soft_capped(softcap)
    return partial(
        paged_flex._attend, block_size=block_size, scaling=scaling, score_mod=score_mod, flex=dense_paged_flex
    )


def dense_paged_flex(
    query: Tensor, key: Tensor, value: Tensor, *, score_mod: Any, block_mask: Any, scale: float, enable_gqa: bool,
    kernel_options: Any, return_aux: AuxRequest | None = None,
) -> Any:
    """Return what FlexAttention returns: query [T,H,Q,D], key [1,K,S,D], value [1,K,S,V] -> [T,H,Q,V]."""
    assert enable_gqa == (query.shape[1] > key.shape[1])
    return _dense(
        query, key, value, visited_slots(block_mask), score_mod=score_mod, scale=scale,
        with_sums=return_aux is not None,
    )


def visited_slots(mask: Any) -> Tensor:
    """Return the slots that a kernel reads for each query, [T,1,Q,S]: the rule counts in partial blocks alone."""
    rule = seen_slots(mask)
    partial_slots = _listed_slots(mask.kv_num_blocks, mask.kv_indices, mask)
    if mask.full_kv_num_blocks is None:
        return rule & partial_slots
    return (rule & partial_slots) | _listed_slots(mask.full_kv_num_blocks, mask.full_kv_indices, mask)


def seen_slots(mask: Any) -> Tensor:
    """Return the slots that each query sees by the mask's rule, [T,1,Q,S]."""
    num_tiles, (num_queries, num_slots) = mask.kv_indices.shape[0], mask.seq_lengths
    device = mask.kv_indices.device
    tiles, queries, slots = (torch.arange(n, device=device) for n in (num_tiles, num_queries, num_slots))
    seen: Tensor = mask.mask_mod(
        tiles[:, None, None, None], None, queries[None, None, :, None], slots[None, None, None, :]
    )
    return seen


def _listed_slots(counts: Tensor, blocks: Tensor, mask: Any) -> Tensor:
    """Return the slots of the first `counts` [T,1,1] of the blocks [T,1,1,W], as [T,1,1,S] bool."""
    block_size, num_slots = mask.BLOCK_SIZE[1], mask.seq_lengths[1]
    num_blocks, width = num_slots // block_size, blocks.shape[3]
    is_listed = torch.arange(width, device=blocks.device) < counts[..., None]
    places = torch.where(is_listed, blocks, num_blocks).long()[:, 0, 0]
    chosen = torch.zeros(len(places), num_blocks + 1, dtype=torch.bool, device=blocks.device)
    chosen = chosen.scatter(1, places, torch.ones_like(places, dtype=torch.bool))[:, :num_blocks]
    return chosen[:, :, None].expand(-1, -1, block_size).reshape(-1, 1, 1, num_slots)
