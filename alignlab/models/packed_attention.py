"""Attention over packed sequences, some of which share a prompt; the prompt's keys and values are never copied.

Shapes: N tokens, T keys, H heads, K kv heads, G = H / K heads a kv head, D head size, V size of a value's head; b
problems of M queries and S keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignlab.models.attention_plan import Block, attention_blocks
from alignlab.models.flex_attention import flex_packed_attention
from alignlab.models.native_attention.choice import is_native
from alignlab.models.native_attention.function import native_attention
from alignlab.models.own_precision import in_own_precision
from alignlab.types import Segments

Hide = Callable[[Tensor, Block], Tensor]
"""(scores [K, b, M, G, S] of a block, -inf where a query does not see a key; the block) -> the scores, more of them
-inf, in their memory. It is given the same scores in the forward and in the backward pass."""


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments,
    *, scaling: float, sliding_window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """Return attention of each token to its segment up to itself, and to all of its segment's prompt.

    Args:
        query, key, value: [1,H,N,D], [1,K,N,D], [1,K,N,V], positions already applied.
        segments: on the same device.
        scaling: factor of the scores, before the cap.
        sliding_window: a token sees this many tokens of its sequence, itself included; None sees all.
        softcap: scores become cap * tanh(score / cap).
        sinks: [H], a logit of each head that joins the softmax, uncapped, and adds nothing to the output.

    Returns:
        [1,N,H,V]. On CUDA by torch's FlexAttention; in bfloat16 on a CPU by compiled kernels, where they can be had; by
        blocks of matrix products elsewhere.
    """
    assert query.shape[0] == 1 and query.shape[2] == segments.num_tokens
    query, key, value = in_autocast_dtype(query, key, value)
    if query.is_cuda:
        return flex_packed_attention(
            query, key, value, segments, scaling=scaling, sliding_window=sliding_window, softcap=softcap, sinks=sinks
        )
    if is_native(query, value):
        return native_attention(
            query, key, value, segments, scaling=scaling, sliding_window=sliding_window, softcap=softcap, sinks=sinks
        )
    blocks = attention_blocks(segments, sliding_window)
    return block_attention(query, key, value, blocks, scaling=scaling, softcap=softcap, sinks=sinks)


def in_autocast_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tensors in the dtype of autocast, where it is on, in which attention is computed then."""
    device = query.device.type
    if not torch.is_autocast_enabled(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def block_attention(
    query: Tensor, key: Tensor, value: Tensor, blocks: list[Block],
    *, scaling: float, softcap: float | None = None, sinks: Tensor | None = None, hide: Hide | None = None,
) -> Tensor:
    """Return attention by the blocks of a plan, which may have more keys than queries.

    Args:
        query, key, value: [1,H,N,D], [1,K,T,D], [1,K,T,V], in the dtype that they are computed in.
        blocks: every visible pair once; those that are first have every query once.
        scaling, softcap, sinks: see `packed_attention`.
        hide: hides more keys, each head its own.

    Returns:
        [1,N,H,V]
    """
    output: Tensor = _BlockAttention.apply(query, key, value, sinks, blocks, scaling, softcap, hide)
    return output


class _BlockAttention(torch.autograd.Function):
    """Blocks merged by an online softmax; the backward pass computes each block's weights again.

    Scores and softmax are float32; weights are rounded to the inputs' dtype for the products, as flash kernels do.
    With P the softmax over all blocks and delta = sum(dO * O), each block's part is exact on its own:
        dV = P^T dO,  dS = P * (dO V^T - delta),  dQ = dS K,  dK = dS^T Q    (Dao 2023, arXiv:2307.08691)
    A sink s joins the softmax once, after the blocks, as one more key whose value is 0: ds = -sum exp(s - lse) delta.

    Inside, tensors are [K, N + 1, G, D] or [K, T + 1, D], their last token being the padding of the blocks.
    """

    @staticmethod
    @in_own_precision
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, blocks: list[Block],
        scaling: float, softcap: float | None, hide: Hide | None,
    ) -> Tensor:
        """Compute attention by the blocks of a plan: [1,K*G,N,D], [1,K,T,D] and [1,K,T,V] -> [1,N,K*G,V]."""
        exact = torch.promote_types(query.dtype, torch.float32)
        num_kv = key.shape[1]
        q, k, v = _rows(query, num_kv, exact).mul_(scaling), _rows(key, num_kv, exact), _rows(value, num_kv)
        out = query.new_empty(*q.shape[:3], value.shape[3])
        top, total = q.new_empty(q.shape[:3]), q.new_empty(q.shape[:3])
        for block in blocks:
            scores = _hide(_scores(q, k, block, softcap), block, hide)
            peak = scores.amax(-1).clamp_min_(torch.finfo(exact).min)  # finite where nothing is visible
            weights = scores.sub_(peak[..., None]).exp_()
            mass = weights.sum(-1)
            output = torch.bmm(_flat(weights.to(v.dtype)), _take(v, block.keys))
            _merge((out, top, total), block, (output, peak, mass))
        logsumexp = top.add_(total.log())
        out.div_(total[..., None])
        if sinks is not None:
            joined = torch.logaddexp(logsumexp, sinks.to(exact).view(num_kv, 1, -1))
            out.mul_((logsumexp - joined).exp_()[..., None])
            logsumexp = joined
        logsumexp[:, -1] = torch.inf  # no weight, and so no gradient, for padded queries
        ctx.save_for_backward(query, key, value, sinks, out, logsumexp)
        ctx.blocks, ctx.scaling, ctx.softcap, ctx.hide = blocks, scaling, softcap, hide
        return _heads(out, query.dtype).transpose(1, 2)

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return gradients of query, key, value and sinks, in their layout and dtype, from that of the output."""
        query, key, value, sinks, out, logsumexp = ctx.saved_tensors
        exact, num_kv = logsumexp.dtype, key.shape[1]
        scaled_q, exact_k = _rows(query, num_kv, exact).mul_(ctx.scaling), _rows(key, num_kv, exact)
        q, k, v = _rows(query, num_kv), _rows(key, num_kv), _rows(value, num_kv)
        grad = _rows(grad.transpose(1, 2), num_kv)
        delta = (grad.to(exact) * out).sum(-1)
        grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=exact, device=x.device) for x in (q, k, v))
        for block in ctx.blocks:
            scores = _scores(scaled_q, exact_k, block, ctx.softcap)
            slope = None if ctx.softcap is None else (scores / ctx.softcap).square_().neg_().add_(1)
            weights = _hide(scores, block, ctx.hide).sub_(_per_query(logsumexp, block)).exp_()
            block_grad = _take(grad, block.queries)
            _add(grad_v, block.keys, torch.bmm(_flat(weights.to(v.dtype)).transpose(1, 2), block_grad))
            slopes = torch.bmm(block_grad, _take(v, block.keys).transpose(1, 2)).view(weights.shape)
            weights.mul_(slopes - _per_query(delta, block))
            if slope is not None:
                weights.mul_(slope)
            grad_scores = _flat(weights.to(v.dtype))
            _add(grad_q, block.queries, torch.bmm(grad_scores, _take(k, block.keys)))
            _add(grad_k, block.keys, torch.bmm(grad_scores.transpose(1, 2), _take(q, block.queries)))
        grad_q.mul_(ctx.scaling)
        grad_k.mul_(ctx.scaling)
        grads = _heads(grad_q, query.dtype), _heads(grad_k, key.dtype), _heads(grad_v, value.dtype)
        return *grads, _sink_gradient(sinks, logsumexp, delta), None, None, None, None


def _sink_gradient(sinks: Tensor | None, logsumexp: Tensor, delta: Tensor) -> Tensor | None:
    """Return the gradient of sinks [H] from [K, N+1, G], each query's softmax and its sum(dO * O)."""
    if sinks is None:
        return None
    weights = (sinks.to(logsumexp.dtype).view(len(logsumexp), 1, -1) - logsumexp[:, :-1]).exp_()
    return (weights * delta[:, :-1]).sum(1).neg_().flatten().to(sinks.dtype)  # the padding's delta may be nan


def _rows(x: Tensor, num_kv: int, dtype: torch.dtype | None = None) -> Tensor:
    """[1, K*G, N, D] -> [K, N+1, G, D], the last token zero."""
    _, heads, tokens, dim = x.shape
    rows = torch.empty(num_kv, tokens + 1, heads // num_kv, dim, dtype=dtype or x.dtype, device=x.device)
    rows[:, :tokens] = x.view(num_kv, -1, tokens, dim).transpose(1, 2)
    rows[:, tokens] = 0
    return rows


def _heads(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """[K, N+1, G, D] -> [1, K*G, N, D], laid out in memory as [N, K*G, D]."""
    return rows[:, :-1].transpose(0, 1).to(dtype).flatten(1, 2).transpose(0, 1)[None]


def _take(rows: Tensor, index: Tensor) -> Tensor:
    """Rows [K, N+1, G, D] of tokens [b, M] -> [K*b, M*G, D]."""
    num_kv, _, _, dim = rows.shape
    return rows.index_select(1, index.flatten()).view(num_kv * index.shape[0], -1, dim)


def _per_query(rows: Tensor, block: Block) -> Tensor:
    """One number a query and head, [K, N+1, G] -> [K, b, M, G, 1]."""
    num_kv, _, groups = rows.shape
    return rows.index_select(1, block.queries.flatten()).view(num_kv, *block.queries.shape, groups, 1)


def _flat(scores: Tensor) -> Tensor:
    """[K, b, M, G, S] -> [K*b, M*G, S]."""
    return scores.flatten(2, 3).flatten(0, 1)


def _add(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Add [K*b, M*G, D] to rows [K, N+1, G, D] of tokens [b, M]."""
    total.index_add_(1, index.flatten(), values.view(total.shape[0], -1, *total.shape[2:]).to(total.dtype))


def _scores(q: Tensor, k: Tensor, block: Block, softcap: float | None) -> Tensor:
    """Scores of a block, [K, b, M, G, S]."""
    scores = torch.bmm(_take(q, block.queries), _take(k, block.keys).transpose(1, 2))
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    return scores.view(q.shape[0], *block.queries.shape, q.shape[2], -1)


def _hide(scores: Tensor, block: Block, hide: Hide | None) -> Tensor:
    """Set scores to -inf, in place, where a query does not see a key."""
    if block.bias is not None:
        scores = scores.add_(block.bias[:, :, None])
    return scores if hide is None else hide(scores, block)


def _merge(state: tuple[Tensor, Tensor, Tensor], block: Block, new: tuple[Tensor, Tensor, Tensor]) -> None:
    """Merge a block's unnormalised (output, peak, mass) into those of its queries, as an online softmax does."""
    index = block.queries.flatten()
    num_kv = len(state[0])
    output, peak, mass = (x.view(num_kv, len(index), *y.shape[2:]) for x, y in zip(new, state, strict=True))
    if not block.first:
        old_output, old_peak, old_mass = (x.index_select(1, index) for x in state)
        new_peak = torch.maximum(peak, old_peak)
        factor, old_factor = (peak - new_peak).exp_(), (old_peak - new_peak).exp_()
        output = (old_output * old_factor[..., None]).add_(output * factor[..., None]).to(old_output.dtype)
        peak, mass = new_peak, mass * factor + old_mass * old_factor
    for old, value in zip(state, (output, peak, mass), strict=True):
        old.index_copy_(1, index, value)
