"""Cross-entropy of given tokens and z-loss of their distributions, from hidden states and the head, chunk by chunk.

The logits are those of `logprobs`, and exist for a chunk alone. Shapes: M tokens that are taught, D hidden, V
vocabulary.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from alignlab.functional.logprobs import ScoreOptions, check_temperature, chunk_size, differentiable


class CrossEntropy(NamedTuple):
    """Losses of M tokens and their parts, [M] each, float32 (float64 for float64).

    Attributes:
        loss: carries the gradient.
        logprobs, entropy: nats, see `chunked_logprobs`; without a gradient.
        log_normalizer: log Z; without a gradient.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor
    log_normalizer: Tensor


def chunked_cross_entropy(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "M"],
    *,
    label_weight: float = 1.0,
    label_smoothing: float = 0.0,
    z_loss_coef: float = 0.0,
    temperature: float = 1.0,
    bias: Float[Tensor, "V"] | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> CrossEntropy:
    """Cross-entropy of each target under a smoothed label, and z-loss, without the logits of more than a chunk.

        z     = head_logits(hidden, weight, bias, softcap) / temperature
        log p = z - log Z,  log Z = logsumexp(z)
        loss  = w (-(1 - eps) log p_y - eps / V sum_v log p_v) + c (log Z)^2
        d loss / d z_v = (w + 2 c log Z) p_v - w (1 - eps) 1[v = y] - w eps / V

    The label is a mixture of the target, with weight 1 - eps, and the uniform distribution over all V rows of the head.
    The z-loss draws log Z to 0, which the cross-entropy leaves free, so that the logits do not drift away. Gradients
    reach `hidden`, `weight` and `bias`, whichever require them; each is returned in its tensor's dtype.

    Args:
        hidden, targets, temperature, chunk_tokens: see `chunked_logprobs`.
        weight, bias, softcap: see `head_logits`.
        label_weight: w, >= 0; 0 leaves the z-loss alone.
        label_smoothing: eps, 0 <= eps < 1.
        z_loss_coef: c, >= 0.

    Reference: label smoothing: Szegedy et al. (2015), arXiv:1512.00567, Sec. 7; z-loss: Chowdhery et al. (2022), PaLM,
    arXiv:2204.02311, Sec. 5.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, and must be at least 0 and below 1; 0.1 is usual")
    for name, number in (("label_weight", label_weight), ("z_loss_coef", z_loss_coef)):
        if number < 0:
            raise ValueError(f"{name} is {number}, and must be at least 0; use 0 to leave that part out")
    check_temperature(temperature)
    size = chunk_size(chunk_tokens, hidden)
    options = ScoreOptions(temperature, softcap, size, 1, label_weight, label_smoothing, z_loss_coef)
    measured = differentiable(hidden, weight, bias, targets, options)
    return CrossEntropy(-measured.score, measured.logprobs, measured.entropy, measured.log_normalizer)
