"""Log-probs and entropy of given tokens from hidden states and the head, a chunk at a time.

The full logits never exist: at most `chunk_tokens` rows of them do, in the hidden states' dtype, and float32 copies of
a few rows at a time that stay in the cache. What a gradient needs is computed when the logits are at hand:

- A frozen head (LoRA, the main case): d logprob / d hidden = (W[y] - E_p[W]) / temperature is one [M, D] tensor, made
  in the forward pass; the backward pass is a product with the incoming gradient. No logits are computed twice.
- A head in training: the logits are computed again in the backward pass, chunk by chunk; the gradient of W is
  accumulated in float32.

Shapes: M tokens whose log-prob is wanted, D hidden, V vocabulary, C tokens of one chunk, R rows of one block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignlab.functional.precision import at_least_float32

CPU_BLOCK_LOGITS = 2**18
"""Logits a thread works on at one time on a CPU: 1 MiB of float32, so that the passes over them stay in the cache."""


def head_logits(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "M V"]:
    """Logits of every vocabulary entry, in float32: the one definition that training and sampling share.

        x      = hidden @ weight^T + bias        product in the dtype of `hidden`, the rest in float32
        logits = softcap * tanh(x / softcap)     or x without a softcap

    Args:
        hidden: hidden states after the last norm.
        weight: the head, or the tied embedding; cast to the dtype of `hidden` where it has another.
        bias: of the head.
        softcap: > 0; bounds the logits' size.

    Reference: soft-capping: Gemma Team (2024), Gemma 2, arXiv:2408.00118, Sec. 2.
    """
    return _finished(hidden @ weight.to(hidden.dtype).T, bias, softcap)


def chunked_logprobs(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "M"],
    *,
    bias: Float[Tensor, "V"] | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    chunk_tokens: int = 512,
    entropy_grad: bool = False,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"]]:
    """Log-prob of each target and entropy of each distribution, without holding the logits of more than a chunk.

        z        = head_logits(hidden, weight, bias, softcap) / temperature
        logprobs = z[y] - logsumexp(z)                 d / dz_v = 1[v = y] - p_v
        entropy  = logsumexp(z) - sum_v p_v z_v        d / dz_v = -p_v (log p_v + entropy)

    Gradients reach `hidden`, `weight` and `bias`, whichever require them; each is returned in its tensor's dtype.

    Args:
        hidden: hidden state that predicts each target, after the last norm, in any float dtype.
        weight, bias, softcap: see `head_logits`.
        targets: token ids, 0..V-1.
        temperature: > 0; the logits are divided by it.
        chunk_tokens: C >= 1; more is faster up to a few hundred, memory is about C * V numbers of `hidden`'s dtype.
        entropy_grad: whether the entropy carries a gradient; costs one more product with the head.

    Returns:
        (logprobs, entropy), both [M], nats, float32 (float64 for float64).
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, and must be > 0: greedy sampling has no log-probs; use 1")
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens is {chunk_tokens}, and must be at least 1; 512 is usual")
    options = _Options(temperature, softcap, chunk_tokens, entropy_grad, torch.is_grad_enabled())
    return _ChunkedLogprobs.apply(hidden, weight, bias, targets.long(), options)


@dataclass(frozen=True)
class _Options:
    temperature: float
    softcap: float | None
    chunk_tokens: int
    entropy_grad: bool
    grad_enabled: bool


@dataclass(frozen=True)
class _Rows:
    """The distributions of a block of tokens, with what their gradients need."""

    logprobs: Float[Tensor, "R"]
    entropy: Float[Tensor, "R"]
    probs: Float[Tensor, "R V"]
    log_probs: Float[Tensor, "R V"]
    slope: Float[Tensor, "R V"] | float
    """d z / d (product with the head)."""

    def logprob_gradient(self, targets: Int[Tensor, "R"]) -> Float[Tensor, "R V"]:
        """d logprobs / d (product with the head); overwrites `probs`."""
        onehot_less_probs = self.probs.neg_().scatter_add_(1, targets[:, None], self.probs.new_ones(len(targets), 1))
        return onehot_less_probs.mul_(self.slope)

    def entropy_gradient(self) -> Float[Tensor, "R V"]:
        """d entropy / d (product with the head)."""
        return (self.log_probs + self.entropy[:, None]).mul_(self.probs).mul_(self.slope).neg_()


class _ChunkedLogprobs(torch.autograd.Function):
    """`chunked_logprobs`; see the module's docstring for what is saved when."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: _Options
    ) -> tuple[Tensor, Tensor]:
        head_grad = weight.requires_grad or (bias is not None and bias.requires_grad)
        hidden_only = options.grad_enabled and hidden.requires_grad and not head_grad
        logprobs = hidden.new_empty(len(targets), dtype=_statistics_dtype(hidden))
        entropy = torch.empty_like(logprobs)
        by_logprob = torch.empty_like(hidden) if hidden_only else None
        by_entropy = torch.empty_like(hidden) if hidden_only and options.entropy_grad else None
        weight_cast = weight.to(hidden.dtype)
        for chunk in _slices(len(targets), options.chunk_tokens):
            products = hidden[chunk] @ weight_cast.T
            entropy_products = torch.empty_like(products) if by_entropy is not None else None
            for rows in _blocks(products):
                token = slice(chunk.start + rows.start, chunk.start + rows.stop)
                block = _distributions(products[rows], targets[token], bias, options)
                logprobs[token], entropy[token] = block.logprobs, block.entropy
                if entropy_products is not None:
                    entropy_products[rows] = block.entropy_gradient()
                if hidden_only:
                    products[rows] = block.logprob_gradient(targets[token])
            if by_logprob is not None:
                torch.mm(products, weight_cast, out=by_logprob[chunk])
            if by_entropy is not None and entropy_products is not None:
                torch.mm(entropy_products, weight_cast, out=by_entropy[chunk])
        ctx.options, ctx.head_grad = options, head_grad
        if head_grad:
            ctx.save_for_backward(hidden, weight, bias, targets)
        else:
            ctx.save_for_backward(by_logprob, by_entropy)
        if not options.entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.head_grad:
            return (*_head_backward(ctx, grad_logprobs, grad_entropy), None, None)
        by_logprob, by_entropy = ctx.saved_tensors
        grad_hidden = grad_logprobs[:, None] * by_logprob
        if by_entropy is not None:
            grad_hidden += grad_entropy[:, None] * by_entropy
        return grad_hidden.to(by_logprob.dtype), None, None, None, None


def _head_backward(
    ctx: Any, grad_logprobs: Tensor, grad_entropy: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, from logits computed again."""
    hidden, weight, bias, targets = ctx.saved_tensors
    options, (needs_hidden, needs_weight, needs_bias) = ctx.options, ctx.needs_input_grad[:3]
    dtype = _statistics_dtype(hidden)
    grad_hidden = torch.empty_like(hidden) if needs_hidden else None
    grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
    grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias else None
    weight_cast = weight.to(hidden.dtype)
    for chunk in _slices(len(targets), options.chunk_tokens):
        products = hidden[chunk] @ weight_cast.T
        for rows in _blocks(products):
            token = slice(chunk.start + rows.start, chunk.start + rows.stop)
            block = _distributions(products[rows], targets[token], bias, options)
            by_entropy = block.entropy_gradient() if options.entropy_grad else None
            gradient = block.logprob_gradient(targets[token]).mul_(grad_logprobs[token, None])
            if by_entropy is not None:
                gradient.addcmul_(by_entropy, grad_entropy[token, None])
            if grad_bias is not None:
                grad_bias += gradient.sum(0)
            products[rows] = gradient
        if grad_hidden is not None:
            torch.mm(products, weight_cast, out=grad_hidden[chunk])
        if grad_weight is not None:
            grad_weight += products.T @ hidden[chunk]
    return (
        grad_hidden,
        None if grad_weight is None else grad_weight.to(weight.dtype),
        None if grad_bias is None else grad_bias.to(bias.dtype),
    )


def _distributions(products: Tensor, targets: Tensor, bias: Tensor | None, options: _Options) -> _Rows:
    """Softmax of a block's logits. May overwrite `products`, which the caller is done with."""
    logits = _finished(products, bias, options.softcap)
    slope: Tensor | float = 1.0 / options.temperature
    if options.softcap is not None:
        slope = (1.0 - (logits / options.softcap).square()).mul_(slope)
    shifted = logits.sub_(logits.amax(dim=-1, keepdim=True))
    if options.temperature != 1.0:
        shifted.div_(options.temperature)
    probs = shifted.exp()
    total = probs.sum(dim=-1, keepdim=True)
    probs.div_(total)
    log_probs = shifted.sub_(total.log())
    entropy = -torch.linalg.vecdot(probs, log_probs)
    return _Rows(log_probs.gather(1, targets[:, None])[:, 0], entropy, probs, log_probs, slope)


def _finished(products: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits from the products of hidden states and head."""
    logits = at_least_float32(products)
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _statistics_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _blocks(products: Tensor) -> Iterator[slice]:
    """Rows of a chunk to be worked on at one time: few on a CPU, where they fit its cache; all on a GPU."""
    num_rows, vocabulary = products.shape
    if products.device.type != "cpu":
        return _slices(num_rows, num_rows)
    return _slices(num_rows, max(1, CPU_BLOCK_LOGITS * torch.get_num_threads() // vocabulary))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
