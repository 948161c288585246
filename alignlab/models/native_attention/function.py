"""Packed attention by the kernels, with its gradient.

Shapes: N tokens, H heads, K kv heads, D head size, V size of a value's head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignlab.models.native_attention.binding import ALL_TOKENS, ProblemStruct, kernels_of, tensor_struct
from alignlab.types import Segments


def native_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments,
    *, scaling: float, sliding_window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None,
) -> Tensor:
    """Return attention of each token to its segment up to itself, and to all of its segment's prompt.

    Arguments and result are `packed_attention`'s, on the CPU; D and V are multiples of 16.

    Raises:
        BuildError: the kernels could not be compiled.
    """
    output: Tensor = _NativeAttention.apply(query, key, value, sinks, segments, scaling, sliding_window, softcap)
    return output


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, segments: Segments, scaling: float,
        sliding_window: int | None, softcap: float | None,
    ) -> Tensor:
        """Compute attention: [1,H,N,D], [1,K,N,D] and [1,K,N,V] -> [1,N,H,V]."""
        query, key, value = _readable(query), _readable(key), _readable(value)
        _, heads, tokens, _ = query.shape
        output = query.new_empty(1, tokens, heads, value.shape[3])
        logsumexp = torch.empty(heads, tokens)
        exact_sinks = None if sinks is None else sinks.detach().float().contiguous()
        ctx.segments, ctx.options = segments, (scaling, sliding_window, softcap)
        problem = _problem(ctx, query, key, value, output, logsumexp, exact_sinks)
        kernels_of(query.dtype).forward(problem)
        ctx.save_for_backward(query, key, value, output, logsumexp, sinks)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of query, key, value and sinks, in their shapes and dtypes, from that of the output."""
        query, key, value, output, logsumexp, sinks = ctx.saved_tensors
        exact_sinks = None if sinks is None else sinks.detach().float().contiguous()
        problem = _problem(ctx, query, key, value, output, logsumexp, exact_sinks)
        grads = [torch.empty(_by_token(x), dtype=x.dtype).transpose(1, 2) for x in (query, key, value)]
        names = ("query", "key", "value", "output")
        for name, tensor in zip(names, (*grads, _readable(grad.transpose(1, 2))), strict=True):
            heads, tokens, size = tensor.shape[1:]
            problem.keep(f"grad_{name}", tensor_struct(tensor, tokens, heads, size, query.dtype))
        grad_sinks = None if exact_sinks is None else torch.empty_like(exact_sinks)
        if grad_sinks is not None:
            problem.hold(grad_sinks=(grad_sinks, (len(grad_sinks),), torch.float32))
        kernels_of(query.dtype).backward(problem)
        return *grads, None if grad_sinks is None else grad_sinks.to(sinks.dtype), None, None, None, None


def _by_token(x: Tensor) -> tuple[int, ...]:
    """[1,H,N,D] -> the shape [1,N,H,D], in which the projections before attention have their outputs."""
    return x.shape[0], x.shape[2], x.shape[1], x.shape[3]


def _readable(x: Tensor) -> Tensor:
    """Return a tensor whose last dimension lies side by side, from addresses that kernels can read words at."""
    odd = any(part * x.itemsize % 4 for part in x.stride()[:3]) or x.data_ptr() % 4
    # A clone also of what is contiguous already, from an odd address on.
    return x.clone(memory_format=torch.contiguous_format) if odd or x.stride(3) != 1 else x


def _problem(
    ctx: Any, query: Tensor, key: Tensor, value: Tensor, output: Tensor, logsumexp: Tensor, sinks: Tensor | None
) -> ProblemStruct:
    """Return the structure of a forward pass; its fields of gradients are empty."""
    _, heads, tokens, size = query.shape
    num_kv, value_size, dtype = key.shape[1], value.shape[3], query.dtype
    segments = ctx.segments
    scaling, window, softcap = ctx.options
    count = len(segments.lengths)
    if segments.num_tokens != tokens or heads % num_kv:
        raise ValueError(f"{tokens} tokens of {heads} heads on {num_kv} do not fit segments of {segments.num_tokens}")
    problem = ProblemStruct(
        num_segments=count, num_tokens=tokens, num_heads=heads, num_kv_heads=num_kv, size=size, value_size=value_size,
        window=window or ALL_TOKENS, num_threads=torch.get_num_threads(), scale=scaling, softcap=softcap or 0.0,
    )  # fmt: skip
    problem.hold(
        query=tensor_struct(query, tokens, heads, size, dtype), key=tensor_struct(key, tokens, num_kv, size, dtype),
        value=tensor_struct(value, tokens, num_kv, value_size, dtype),
        output=tensor_struct(output.transpose(1, 2), tokens, heads, value_size, dtype),
        logsumexp=(logsumexp, (heads, tokens), torch.float32),
        **{
            name: (torch.tensor(numbers), (count,), torch.int64)
            for name, numbers in (
                ("starts", segments.starts), ("lengths", segments.lengths), ("prefixes", segments.prefixes)
            )
        },
    )
    if sinks is not None:
        problem.hold(sinks=(sinks, (heads,), torch.float32))
    return problem
