"""Packed attention on a GPU, by torch's FlexAttention: compiled kernels that skip blocks of hidden keys.

Which blocks are hidden follows from the segments, so the host computes it, linear in tokens and in pairs of blocks; a
mask of all pairs of tokens never exists. Packs are padded to whole blocks, by a segment that only sees itself, so that
packs of any length share one compiled kernel.

Shapes: N tokens, T tokens with padding, C blocks of tokens, H heads, K kv heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from alignlab.transfer import to_device
from alignlab.types import Segments

BLOCK = 128
_MIN_TOKENS = 2 * BLOCK  # torch compiles other kernels for a single block
_RECOMPILE_LIMIT = 32
"""Kernels of one mask and score rule: at most 3 for a model and dtype, with and without gradients."""

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def flex_packed_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments,
    *, scaling: float, sliding_window: int | None, softcap: float | None, sinks: Tensor | None = None,
    flex: Callable[..., Any] | None = None,
) -> Tensor:
    """Return what `packed_attention` returns, by FlexAttention; its block mask is cached on `segments` by window.

    Args:
        flex: in place of the compiled `flex_attention`.

    Raises:
        FailOnRecompileLimitHit: torch would compile for one mask and score rule more often than is ever needed.
    """
    masks: dict[int | None, BlockMask] = segments.__dict__.setdefault("_flex_masks", {})
    if sliding_window not in masks:
        masks[sliding_window] = block_mask(segments, sliding_window, query.device)
    mask, num_tokens = masks[sliding_window], segments.num_tokens
    padding = (0, 0, 0, mask.seq_lengths[0] - num_tokens)
    if padding[-1]:
        query, key, value = (F.pad(x, padding) for x in (query, key, value))
    attend = flex or _compiled_flex(sliding_window is not None, softcap)
    out = attend_with_sinks(
        attend, query, key, value, sinks, score_mod=None if softcap is None else soft_capped(softcap), block_mask=mask,
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[:, :, :num_tokens].transpose(1, 2)


def attend_with_sinks(
    flex: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, **options: Any
) -> Tensor:
    """Return FlexAttention [B,H,N,V] of queries [B,H,N,D], whose softmax the sinks [H] have joined, if there are any.

    A sink with logit s takes the share exp(s - lse') of the softmax, lse' being the logarithm of the sum with it: the
    output is that without sinks, times sigmoid(lse - s).
    """
    if sinks is None:
        out: Tensor = flex(query, key, value, **options)
        return out
    out, aux = flex(query, key, value, return_aux=AuxRequest(lse=True), **options)
    share = torch.sigmoid(aux.lse.float() - sinks.float()[:, None])
    return (out * share[..., None]).to(out.dtype)


@cache
def _compiled_flex(has_window: bool, softcap: float | None) -> Callable[..., Tensor]:
    """Return FlexAttention for one mask and score rule. Dense attention never takes its place: that is an error."""
    compiled: Callable[..., Tensor] = torch.compile(  # type: ignore[call-overload]  # stubs miss two arguments
        flex_attention, fullgraph=True, dynamic=True, recompile_limit=_RECOMPILE_LIMIT, isolate_recompiles=True
    )
    # Scale and soft-cap are constants of a kernel: as tensors, which `dynamic` makes of them, they cannot be traced.
    from torch._dynamo import config  # slow to import, and of use on a GPU alone

    constants: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = config.patch(specialize_float=True)
    return constants(compiled)


def block_mask(segments: Segments, window: int | None, device: torch.device) -> BlockMask:
    """Return FlexAttention's mask of a pack with its padding, made on the host and moved to `device` by one copy.

    Args:
        window: a token sees this many tokens of its sequence, itself included; None sees all.
    """
    padded = padded_to_blocks(segments)
    counts = visible_pairs(padded, window)
    full = counts == BLOCK * BLOCK
    partial = (counts > 0) & ~full
    blocks = [tensor for dense in (partial, full, partial.T, full.T) for tensor in _ordered(dense)]
    of_tokens = [padded.segment_of_token, torch.tensor(padded.prefixes)[padded.segment_of_token]]
    if window is not None:
        of_tokens += [padded.position_ids, padded.position_ids - window + 1]
    kv, kv_index, full_kv, full_kv_index, q, q_index, full_q, full_q_index, *of_tokens = to_device(
        [*blocks, *of_tokens], device
    )
    return BlockMask(
        (padded.num_tokens, padded.num_tokens), kv, kv_index, full_kv, full_kv_index, q, q_index, full_q, full_q_index,
        mask_mod=visibility(*of_tokens),
    )


def padded_to_blocks(segments: Segments) -> Segments:
    """Return segments on the host, with one more that fills up the last block, and at least two blocks."""
    total = max(_MIN_TOKENS, -(-segments.num_tokens // BLOCK) * BLOCK)
    padding = total - segments.num_tokens
    if not padding:
        return replace(segments, device=torch.device("cpu"))
    return Segments(
        (*segments.lengths, padding), (*segments.prefixes, -1), (*segments.sequence_ids, -1), (*segments.group_ids, -1)
    )


def visible_pairs(segments: Segments, window: int | None) -> Tensor:
    """Return how many pairs (query, key) are visible in each pair of blocks of T tokens, [C, C] int64.

    A query sees at most two runs of keys: its own segment's up to itself, and its prompt's. Of each run it is counted
    how many keys lie before its end, less those before its beginning.
    """
    starts, lengths, prefixes = (torch.tensor(x) for x in (segments.starts, segments.lengths, segments.prefixes))
    segment, positions, tokens = segments.segment_of_token, segments.position_ids, torch.arange(segments.num_tokens)
    prefix = prefixes[segment]
    prompt_length = torch.where(prefix >= 0, lengths[prefix], 0)
    first_position = torch.zeros_like(tokens) if window is None else (positions - window + 1).clamp_min(0)
    own_start = starts[segment] + (first_position - prompt_length).clamp_min(0)
    prompt_start = starts[prefix] + torch.minimum(first_position, prompt_length)
    prompt_end = starts[prefix] + prompt_length
    own = _keys_before(tokens + 1) - _keys_before(own_start)
    return own + _keys_before(prompt_end) - _keys_before(prompt_start)


def _keys_before(ends: Tensor) -> Tensor:
    """Return how many keys before `ends` [T] lie in each block, summed over the queries of each block: [C, C]."""
    num_blocks = len(ends) // BLOCK
    rows = torch.arange(len(ends)) // BLOCK
    places = rows * (num_blocks + 1) + ends // BLOCK  # of the block in which the keys end
    part, queries = (
        torch.zeros(num_blocks * (num_blocks + 1), dtype=torch.int64).index_add_(0, places, values).view(num_blocks, -1)
        for values in (ends % BLOCK, torch.ones_like(ends))
    )
    ending_later = queries.sum(1, keepdim=True) - queries.cumsum(1)
    return (part + BLOCK * ending_later)[:, :num_blocks]


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of blocks set in each row, [1,1,C] int32, and their columns, the set ones first, [1,1,C,C]."""
    columns = dense.int().argsort(dim=1, descending=True, stable=True)
    return dense.sum(1, dtype=torch.int32)[None, None], columns.to(torch.int32)[None, None]


def visibility(
    segment: Tensor, prefix: Tensor, positions: Tensor | None = None, first_seen: Tensor | None = None
) -> Rule:
    """Return FlexAttention's `mask_mod`: True where token q sees token k.

    Args:
        segment, prefix: [T] of each token, its segment, and the segment's prompt or -1.
        positions, first_seen: [T] of each token, its position, and the first position in its window; None without a
            window. As tensors: a number would be compiled into the kernel.
    """

    def rule(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((segment[q] == segment[k]) & (q >= k)) | (prefix[q] == segment[k])

    if positions is None or first_seen is None:
        return rule

    def rule_in_window(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return rule(batch, head, q, k) & (positions[k] >= first_seen[q])

    return rule_in_window


@cache
def soft_capped(softcap: float) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]:
    """Return FlexAttention's `score_mod`: cap * tanh(score / cap)."""

    def rule(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return rule
