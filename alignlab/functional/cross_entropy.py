"""Cross-entropy of given tokens, the loss of supervised learning, from hidden states and the head, a chunk at a time.

The logits are those of `logprobs`, and exist for a chunk alone. Shapes: M tokens that are taught, D hidden, V
vocabulary.
"""

from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from alignlab.functional.logprobs import ScoreOptions, check_temperature, chunk_size, differentiable


class CrossEntropy(NamedTuple):
    """Cross-entropies of M tokens, nats, float32 (float64 for float64).

    Attributes:
        loss: [M], carries the gradient.
        logprobs, entropy: [M], see `chunked_logprobs`; without a gradient.
    """

    loss: Tensor
    logprobs: Tensor
    entropy: Tensor


def chunked_cross_entropy(
    hidden: Float[Tensor, "M D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, "M"],
    *,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    bias: Float[Tensor, "V"] | None = None,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
) -> CrossEntropy:
    """Cross-entropy of each target under a smoothed label, without holding the logits of more than a chunk.

        z    = head_logits(hidden, weight, bias, softcap) / temperature
        loss = -(1 - eps) log p_y - eps / V sum_v log p_v          eps = label_smoothing
        d loss / d z_v = p_v - (1 - eps) 1[v = y] - eps / V

    The label is a mixture of the target, with weight 1 - eps, and the uniform distribution over all V rows of the head.
    Gradients reach `hidden`, `weight` and `bias`, whichever require them; each is returned in its tensor's dtype.

    Args:
        hidden, targets, temperature, chunk_tokens: see `chunked_logprobs`.
        weight, bias, softcap: see `head_logits`.
        label_smoothing: eps, 0 <= eps < 1.

    Reference: Szegedy et al. (2015), arXiv:1512.00567, Sec. 7.
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing is {label_smoothing}, and must be at least 0 and below 1; 0.1 is usual")
    check_temperature(temperature)
    options = ScoreOptions(temperature, softcap, chunk_size(chunk_tokens, hidden), 1, label_smoothing)
    score, entropy, logprobs = differentiable(hidden, weight, bias, targets, options)
    return CrossEntropy(-score, logprobs, entropy)
