"""The gated delta rule over packed sequences that share prompts, and over one more token of each sequence.

States go from chunk to chunk down a tree: a prompt's last state enters each of its completions, and their gradients sum
there. The backward pass keeps inputs and the states that leave chunks, and computes the rest again.

Shapes: N tokens, M chunks of C tokens, S segments, R sequences, H heads, K key size, V value size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignlab.models.packed_attention import in_own_precision
from alignlab.models.recurrent.chunk_plan import ChunkPlan, chunk_plan
from alignlab.models.recurrent.chunk_products import ChunkProducts, chunk_products
from alignlab.types import Segments

_SLAB_NUMEL = 1 << 26
"""Numbers that the products within chunks may form at once."""


def packed_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor, segments: Segments,
    *, start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the rule's outputs, and the state after each segment; the formulas are those of `chunk_products`.

    Args:
        query, key: [N,H,K], of norm 1, the query scaled; at least float32, as all tensors here.
        value: [N,H,V].
        log_decay: g <= 0, [N,H], or [N,H,K] with a decay for each channel.
        strength: b, [N,H].
        segments: on the same device; a segment with a prefix begins from the prefix's last state.
        start: [S,H,K,V], the states that roots begin from; None for zero.

    Returns:
        [N,H,V], and states [S,H,K,V].
    """
    plan = chunk_plan(segments)
    if start is None:
        start, parents = query.new_zeros(1, *query.shape[1:], value.shape[2]), plan.parents
    else:
        parents = torch.where(plan.parents == plan.num_chunks, plan.num_chunks + plan.segments, plan.parents)
    output, states = _DeltaRule.apply(query, key, value, log_decay, strength, start, parents, plan)
    return output, states.index_select(0, plan.last)


def delta_step(
    state: Tensor, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the outputs [R,H,V] of one token of each sequence, and the states after it [R,H,K,V].

    Args:
        state: [R,H,K,V], before the token.
        query, key, value, log_decay, strength: as in `packed_delta_rule`, with R in the place of N.
    """
    decay = log_decay.exp().view(*log_decay.shape, *[1] * (state.dim() - log_decay.dim()))
    state = state * decay
    read = (key[..., None, :] @ state)[..., 0, :]
    written = (value - read) * strength[..., None]
    state = torch.addcmul(state, key[..., :, None], written[..., None, :])
    return (query[..., None, :] @ state)[..., 0, :], state


class _DeltaRule(torch.autograd.Function):
    """Outputs [N,H,V] of all tokens, and the states that leave chunks [M,H,K,V]."""

    @staticmethod
    @in_own_precision
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, log_decay: Tensor, strength: Tensor, start: Tensor,
        parents: Tensor, plan: ChunkPlan,
    ) -> tuple[Tensor, Tensor]:
        """Compute the rule; arguments as in `packed_delta_rule`, and the parents [M], from M on those of `start`."""
        tokens = (query, key, value, log_decay, strength)
        products = _joined([slab.without_graph() for slab in _slabs(tokens, plan)])
        output, states = _scan(products, start, parents, plan.ranks)
        ctx.save_for_backward(*tokens, states, parents)
        ctx.plan = plan
        return plan.joined(output), states[: plan.num_chunks]

    @staticmethod
    @once_differentiable
    @in_own_precision
    def backward(ctx: Any, grad: Tensor, grad_states: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return gradients of the five tensors of tokens, and of the states at the start."""
        *tokens, states, parents = ctx.saved_tensors
        plan: ChunkPlan = ctx.plan
        slabs = _slabs(tokens, plan)
        is_one = len(slabs) == 1  # its graph may stay while the states are scanned
        products = _joined([slab.with_graph() if is_one else slab.without_graph() for slab in slabs])
        gradients, grad_start = _scan_backward(products, states, parents, plan, plan.cut(grad), grad_states)
        by_slab = [slab.gradients(ChunkProducts(*(part[slab.chunks] for part in gradients))) for slab in slabs]
        grads = [plan.joined(torch.cat(parts)) for parts in zip(*by_slab, strict=True)]
        return *grads, grad_start, None, None


class _Slab:
    """Some consecutive chunks, whose products are formed at once.

    Args:
        tokens: what all chunks hold: query, key, value, log decay and strength.
        chunks: those of the slab.
    """

    def __init__(self, tokens: Sequence[Tensor], chunks: slice) -> None:
        self.chunks = chunks
        self._tokens = [x[chunks].detach().requires_grad_() for x in tokens]
        self._products: ChunkProducts | None = None

    def without_graph(self) -> ChunkProducts:
        """Return the products, from which nothing is differentiated."""
        with torch.no_grad():
            return chunk_products(*self._tokens)

    def with_graph(self) -> ChunkProducts:
        """Return the products, and keep their graph."""
        with torch.enable_grad():
            self._products = chunk_products(*self._tokens)
        return ChunkProducts(*(part.detach() for part in self._products))

    def gradients(self, of_products: ChunkProducts) -> tuple[Tensor, ...]:
        """Return gradients of the tokens' five tensors from those of the products."""
        if self._products is None:
            self.with_graph()
        assert self._products is not None
        products, self._products = self._products, None
        return torch.autograd.grad(products, self._tokens, of_products)


def _slabs(tokens: Sequence[Tensor], plan: ChunkPlan) -> list[_Slab]:
    """Return the chunks in slabs of bounded memory."""
    chunks = [plan.cut(x) for x in tokens]
    _, heads, size, key_size = chunks[1].shape
    of_chunk = heads * size * max(size, 16 * key_size if chunks[3].dim() == 4 else key_size)
    step = max(1, _SLAB_NUMEL // of_chunk)
    return [_Slab(chunks, slice(first, first + step)) for first in range(0, plan.num_chunks, step)]


def _joined(slabs: Sequence[ChunkProducts]) -> ChunkProducts:
    return slabs[0] if len(slabs) == 1 else ChunkProducts(*(torch.cat(parts) for parts in zip(*slabs, strict=True)))


def _scan(
    products: ChunkProducts, start: Tensor, parents: Tensor, ranks: Sequence[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Return outputs [M,H,C,V], and the states that leave chunks, followed by those of the start [M + starts,H,K,V]."""
    u, w, scores, queries, keys, decay = products
    states = torch.cat((start.new_empty(len(parents), *start.shape[1:]), start))
    fresh, output = torch.empty_like(u), torch.empty_like(u)
    for first, end in ranks:
        entering = states.index_select(0, parents[first:end])
        torch.sub(u[first:end], w[first:end] @ entering, out=fresh[first:end])
        torch.matmul(queries[first:end], entering, out=output[first:end])
        written = keys[first:end].transpose(-1, -2) @ fresh[first:end]
        torch.addcmul(written, decay[first:end].expand_as(entering), entering, out=states[first:end])
    return output.add_(scores @ fresh), states


def _scan_backward(
    products: ChunkProducts, states: Tensor, parents: Tensor, plan: ChunkPlan, grad: Tensor, grad_states: Tensor
) -> tuple[ChunkProducts, Tensor]:
    """Return gradients of the products, and of the states at the start.

    With dS' of the state that leaves a chunk, summed over all chunks that it enters, and the formulas' other symbols:
        dv' = A^T do + (k e^(G_C - G)) dS',   dS = (q e^G)^T do + e^(G_C) dS' - w^T dv'
    go from rank to rank; the gradients of the products follow from them, for all chunks at once.

    Args:
        grad: of the outputs, [M,H,C,V].
        grad_states: of the states that leave chunks, [M,H,K,V].
    """
    u, w, scores, queries, keys, decay = products
    count = plan.num_chunks
    grad_all = torch.cat((grad_states, torch.zeros_like(states[count:])))
    grad_fresh = scores.transpose(-1, -2) @ grad
    for first, end in reversed(plan.ranks):
        leaving = grad_all[first:end]
        grad_fresh[first:end] += keys[first:end] @ leaving
        entering = torch.addcmul(
            queries[first:end].transpose(-1, -2) @ grad[first:end], decay[first:end].expand_as(leaving), leaving
        )
        entering -= w[first:end].transpose(-1, -2) @ grad_fresh[first:end]
        grad_all.index_add_(0, parents[first:end], entering)
    entering, leaving = states.index_select(0, parents), grad_all[:count]
    fresh, turned = u - w @ entering, entering.transpose(-1, -2)
    gradients = ChunkProducts(
        u=grad_fresh, w=-(grad_fresh @ turned), scores=grad @ fresh.transpose(-1, -2), queries=grad @ turned,
        keys=fresh @ leaving.transpose(-1, -2), decay=(leaving * entering).sum_to_size(decay.shape),
    )
    return gradients, grad_all[count:]
