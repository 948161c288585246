"""Log-probs and entropy of given tokens from hidden states and the head, a chunk at a time.

The full logits never exist: at most `chunk_tokens` rows of them do, in the hidden states' dtype, and float32 copies of
a few rows at a time that stay in the cache. What a gradient needs is computed when the logits are at hand:

- A frozen head (LoRA, the main case): d logprob / d hidden = (W[y] - E_p[W]) / temperature is one [M, D] tensor, made
  in the forward pass; the backward pass is a product with the incoming gradient. No logits are computed twice.
- A head in training: the logits are computed again in the backward pass, chunk by chunk; the gradient of W is
  accumulated in float32.

Shapes: M tokens whose log-prob is wanted, D hidden, V vocabulary, C tokens of one chunk, R rows of one block.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from alignlab.functional.precision import at_least_float32
from alignlab.functional.products import by_inputs, by_outputs

CPU_BLOCK_LOGITS = 2**18
"""Logits a thread works on at one time on a CPU: 1 MiB of float32, so that the passes over them stay in the cache."""
GPU_BLOCK_LOGITS = 2**26
"""Logits that a GPU works on at one time: enough to keep it busy, in 256 MiB of float32."""
CPU_CHUNK_TOKENS = 512
GPU_CHUNK_TOKENS = 2048
"""Each chunk reads and writes the whole gradient [V,D] of a trained head, in float32: on a GPU that takes the time."""


def default_chunk_tokens(device_type: str) -> int:
    """Return how many tokens a chunk has on a kind of device, where nothing else is asked for."""
    return CPU_CHUNK_TOKENS if device_type == "cpu" else GPU_CHUNK_TOKENS


def block_rows(vocabulary: int, device_type: str) -> int:
    """Return how many rows of a chunk have float32 logits at one time."""
    logits = CPU_BLOCK_LOGITS * torch.get_num_threads() if device_type == "cpu" else GPU_BLOCK_LOGITS
    return max(1, logits // vocabulary)


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
    chunk_tokens: int | None = None,
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
        chunk_tokens: C >= 1; memory is about C * V numbers of `hidden`'s dtype; default: `default_chunk_tokens`.
        entropy_grad: whether the entropy carries a gradient; costs one more product with the head.

    Returns:
        (logprobs, entropy), both [M], nats, float32 (float64 for float64).
    """
    check_temperature(temperature)
    options = ScoreOptions(temperature, softcap, chunk_size(chunk_tokens, hidden), 2 if entropy_grad else 1)
    measured = differentiable(hidden, weight, bias, targets, options)
    return measured.score, measured.entropy


@dataclass(frozen=True)
class ScoreOptions:
    """The score is what is maximised: the log-prob of the target, or the loss of `cross_entropy`, its sign changed.

    `num_gradients`: 0, 1 (of the score), or 2 (of the entropy too).
    """

    temperature: float
    softcap: float | None
    chunk_tokens: int
    num_gradients: int
    label_weight: float = 1.0
    label_smoothing: float = 0.0
    z_loss_coef: float = 0.0


class Measured(NamedTuple):
    """Numbers of M tokens and their distributions, [M] each; the score and, where asked for, the entropy carry a
    gradient.

    Attributes:
        score: see `ScoreOptions`.
        entropy, logprobs: see `chunked_logprobs`.
        log_normalizer: logsumexp of the logits z.
    """

    score: Tensor
    entropy: Tensor
    logprobs: Tensor
    log_normalizer: Tensor


def check_temperature(temperature: float) -> None:
    """Raise a ValueError unless logits can be divided by a temperature."""
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, and must be > 0: greedy sampling has no log-probs; use 1")


def chunk_size(given: int | None, hidden: Tensor) -> int:
    """Return the tokens of a chunk: as given, or the default of the device."""
    if given is not None and given < 1:
        raise ValueError(f"chunk_tokens is {given}, and must be at least 1; 512 is usual")
    return default_chunk_tokens(hidden.device.type) if given is None else given


def differentiable(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: ScoreOptions
) -> Measured:
    """Return what is measured of each target, without holding the logits of more than a chunk."""
    head_in_training = weight.requires_grad or (bias is not None and bias.requires_grad)
    if not torch.is_grad_enabled() or not (head_in_training or hidden.requires_grad):
        return _measure(hidden, weight, bias, targets.long(), replace(options, num_gradients=0))[0]
    function = _TrainedHead if head_in_training else _FrozenHead
    return Measured(*function.apply(hidden, weight, bias, targets.long(), options))


@dataclass(frozen=True)
class _Rows:
    """The distributions of a block of tokens, with what their gradients need."""

    measured: Measured
    probs: Float[Tensor, "R V"]
    log_probs: Float[Tensor, "R V"]
    slope: Float[Tensor, "R V"] | float
    """d z / d (product with the head)."""

    def gradients(self, targets: Int[Tensor, "R"], options: ScoreOptions) -> list[Float[Tensor, "R V"]]:
        """Return the `num_gradients` derivatives by the product with the head: of the score, and of the entropy.

        Overwrites `probs`.
        """
        derivatives = []
        if options.num_gradients == 2:
            surprise = self.log_probs + self.measured.entropy[:, None]
            derivatives.append(surprise.mul_(self.probs).mul_(self.slope).neg_())
        if options.num_gradients >= 1:
            derivatives.insert(0, self._score_gradient(targets, options).mul_(self.slope))
        return derivatives

    def _score_gradient(self, targets: Int[Tensor, "R"], options: ScoreOptions) -> Float[Tensor, "R V"]:
        """Return the derivative of the score by the logits z, in the memory of `probs`."""
        weight, eps = options.label_weight, options.label_smoothing
        label = self.probs.new_full((len(targets), 1), weight * (1.0 - eps))
        if weight == 1.0 and not options.z_loss_coef:
            gradient = self.probs.neg_()
        else:
            gradient = self.probs.mul_(-(weight + 2.0 * options.z_loss_coef * self.measured.log_normalizer)[:, None])
        gradient.scatter_add_(1, targets[:, None], label)
        if eps:
            gradient.add_(weight * eps / gradient.shape[1])
        return gradient


class _FrozenHead(torch.autograd.Function):
    """Gradient of the hidden states alone: made in the forward pass, up to a factor a token."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, ...]:
        """Return the fields of `Measured`; save the derivatives of the first ones by each hidden state."""
        outputs, by_hidden = _measure(hidden, weight, bias, targets, options)
        ctx.save_for_backward(*by_hidden)
        ctx.mark_non_differentiable(*outputs[options.num_gradients :])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply each saved derivative by the incoming gradient."""
        by_hidden = ctx.saved_tensors
        total = sum(d * g[:, None] for d, g in zip(by_hidden, incoming, strict=False))
        return total.to(by_hidden[0].dtype), None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """Gradients of the head too: the logits are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: ScoreOptions
    ) -> tuple[Tensor, ...]:
        """Return the fields of `Measured`; save the inputs."""
        outputs, _ = _measure(hidden, weight, bias, targets, replace(options, num_gradients=0))
        ctx.options = options
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.mark_non_differentiable(*outputs[options.num_gradients :])
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *incoming: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the logits once more, chunk by chunk, and from them all gradients."""
        hidden, weight, bias, targets = ctx.saved_tensors
        dtype = _statistics_dtype(hidden)
        by_hidden = torch.empty_like(hidden)
        by_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        by_bias = torch.zeros_like(bias, dtype=dtype) if ctx.needs_input_grad[2] else None
        head = weight.to(hidden.dtype)

        def weighted(block: _Rows, tokens: slice) -> list[Tensor]:
            first, *by_entropy = block.gradients(targets[tokens], ctx.options)
            first.mul_(incoming[0][tokens, None])
            return [first.addcmul_(more, incoming[1][tokens, None]) for more in by_entropy] or [first]

        for chunk, (by_products,) in _chunks(hidden, head, bias, targets, ctx.options, weighted, num_outputs=1):
            by_hidden[chunk] = by_outputs(by_products, head)
            if by_weight is not None:
                _add_product(by_weight, by_products.T, hidden[chunk])
            if by_bias is not None:
                by_bias += by_products.sum(0, dtype=dtype)
        return by_hidden, _cast(by_weight, weight), _cast(by_bias, bias), None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left [V,C] @ right [C,D] to a total [V,D], without a tensor of that size where there is such a kernel."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.device.type == "cuda":
        torch.ops.aten.addmm.dtype_out(total, left, right, total.dtype, out=total)  # sums in float32, unlike a product
    else:
        total += left @ right


def _cast(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    """Return a gradient in the dtype of its tensor; None if either is None."""
    return None if gradient is None or like is None else gradient.to(like.dtype)


def _measure(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, options: ScoreOptions
) -> tuple[Measured, list[Tensor]]:
    """Return what is measured, and the `num_gradients` derivatives of each token's by its hidden state, [M, D]."""
    dtype = _statistics_dtype(hidden)
    measured = Measured(*(hidden.new_empty(len(targets), dtype=dtype) for _ in Measured._fields))
    by_hidden = [torch.empty_like(hidden) for _ in range(options.num_gradients)]
    head = weight.to(hidden.dtype)

    def record(block: _Rows, tokens: slice) -> list[Tensor]:
        for values, of_block in zip(measured, block.measured, strict=True):
            values[tokens] = of_block
        return block.gradients(targets[tokens], options)

    for chunk, by_products in _chunks(hidden, head, bias, targets, options, record, num_outputs=len(by_hidden)):
        for out, gradient in zip(by_hidden, by_products, strict=True):
            out[chunk] = by_outputs(gradient, head)
    return measured, by_hidden


def _chunks(
    hidden: Tensor,
    head: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: ScoreOptions,
    visit: Callable[[_Rows, slice], list[Tensor]],
    *,
    num_outputs: int,
) -> Iterator[tuple[slice, list[Tensor]]]:
    """Yield each chunk with `num_outputs` tensors [C, V] in the dtype of `hidden`, joined from `visit`'s of each block.

    The first overwrites the chunk's logits, so that only one tensor of that size is held.
    """
    for chunk in _slices(len(targets), options.chunk_tokens):
        products = by_inputs(hidden[chunk], head)
        outputs = [products if i == 0 else torch.empty_like(products) for i in range(num_outputs)]
        for rows in _blocks(products):
            tokens = slice(chunk.start + rows.start, chunk.start + rows.stop)
            block = _distributions(products[rows], targets[tokens], bias, options)
            for output, block_output in zip(outputs, visit(block, tokens), strict=True):
                output[rows] = block_output
        yield chunk, outputs


def _distributions(products: Tensor, targets: Tensor, bias: Tensor | None, options: ScoreOptions) -> _Rows:
    """Return the softmax of a block's logits. May overwrite `products`, which the caller needs no longer."""
    # Not compiled: on a CPU a block's passes stay in the cache, and compiled ones are no faster, round differently, and
    # take half a minute to compile (tests/bench/README.md). On a GPU they would save memory traffic; unmeasured.
    logits = _finished(products, bias, options.softcap)
    slope: Tensor | float = 1.0 / options.temperature
    if options.softcap is not None:
        slope = (1.0 - (logits / options.softcap).square()).mul_(slope)
    largest = logits.amax(dim=-1, keepdim=True)
    shifted = logits.sub_(largest)
    if options.temperature != 1.0:
        shifted.div_(options.temperature)
    probs = shifted.exp()
    total = probs.sum(dim=-1, keepdim=True)
    probs.div_(total)
    log_total = total.log()
    log_probs = shifted.sub_(log_total)
    entropy = -torch.linalg.vecdot(probs, log_probs)
    logprobs = log_probs.gather(1, targets[:, None])[:, 0]
    log_normalizer = largest[:, 0] / options.temperature + log_total[:, 0]
    score = _score(logprobs, log_probs, log_normalizer, options)
    return _Rows(Measured(score, entropy, logprobs, log_normalizer), probs, log_probs, slope)


def _score(logprobs: Tensor, log_probs: Tensor, log_normalizer: Tensor, options: ScoreOptions) -> Tensor:
    """Return what is maximised of a block's tokens [R], from log-probs of the targets [R] and of all ids [R, V]."""
    eps, score = options.label_smoothing, logprobs
    if eps:
        score = (1.0 - eps) * logprobs + eps * log_probs.mean(dim=-1)
    if options.z_loss_coef:
        return options.label_weight * score - options.z_loss_coef * log_normalizer.square()
    return options.label_weight * score


def _finished(products: Tensor, bias: Tensor | None, softcap: float | None) -> Tensor:
    """Logits from the products of hidden states and head."""
    logits = at_least_float32(products)
    if bias is not None:
        logits = logits + bias
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _statistics_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _blocks(products: Tensor) -> Iterator[slice]:
    """Rows of a chunk to be worked on at one time."""
    num_rows, vocabulary = products.shape
    return _slices(num_rows, block_rows(vocabulary, products.device.type))


def _slices(length: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
