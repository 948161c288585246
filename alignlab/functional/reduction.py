"""From one loss a token to one loss a step, in a way that no cut into packs, micro-batches or ranks can change.

    loss of a pack = (per_token_loss * weights).sum()
    loss of a step = sum over all packs and ranks

The weights hold numbers counted over the whole step, so the sum is the same however the step is cut. Shapes: N tokens
of one pack, B sequences of the step.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from alignlab.functional.precision import at_least_float32


def sequence_sum(
    x: Float[Tensor, "N"], sequence_ids: Int[Tensor, "N"], *, num_sequences: int
) -> Float[Tensor, "{num_sequences}"]:
    """Sum of `x` over the tokens of each sequence.

        out[b] = sum of x[t] over t with sequence_ids[t] = b

    A sequence's tokens are added in their order, on every device: a GPU's `index_add` would add them in any.

    Args:
        x: one value a token.
        sequence_ids: which sequence each token belongs to, 0..num_sequences-1; tokens with -1 are left out.
        num_sequences: B, also counting sequences without a token here.
    """
    x = torch.where(sequence_ids >= 0, at_least_float32(x), 0.0)
    ids, order = sequence_ids.clamp(min=0).long().sort(stable=True)
    starts = torch.searchsorted(ids, torch.arange(num_sequences + 1, device=ids.device))
    # Unchecked: a check of the starts, which are ascending by construction, would wait for the device.
    return torch.segment_reduce(x[order], "sum", offsets=starts, axis=0, unsafe=True)


def sequence_mean(
    x: Float[Tensor, "N"], mask: Bool[Tensor, "N"], sequence_ids: Int[Tensor, "N"], *, num_sequences: int
) -> Float[Tensor, "{num_sequences}"]:
    """Mean of `x` over the masked tokens of each sequence; 0 for a sequence without one.

    Args:
        x: one value a token; may be anything, also nan, off the mask.
        mask: tokens that count.
        sequence_ids, num_sequences: see `sequence_sum`.
    """
    x = at_least_float32(x)
    sums = sequence_sum(torch.where(mask, x, 0.0), sequence_ids, num_sequences=num_sequences)
    counts = sequence_sum(mask.to(x.dtype), sequence_ids, num_sequences=num_sequences)
    return sums / counts.clamp(min=1)


def on_tokens(
    values: Float[Tensor, "B"], sequence_ids: Int[Tensor, "N"], *, elsewhere: float
) -> Float[Tensor, "N"]:
    """Value of each token's sequence, on the token.

    Args:
        values: one a sequence.
        sequence_ids: which sequence each token belongs to.
        elsewhere: value of tokens with -1, such as those of shared prompts.
    """
    return torch.where(sequence_ids >= 0, values[sequence_ids.clamp(min=0).long()], elsewhere)


def token_mean_weights(mask: Bool[Tensor, "N"], *, num_tokens: int) -> Float[Tensor, "N"]:
    """Weights of a mean over all tokens of the step: every token counts the same.

        weight[t] = mask[t] / num_tokens

    Args:
        mask: tokens that we train on.
        num_tokens: masked tokens of the whole step, over all packs and ranks.

    Reference: Yu et al. (2025), DAPO, arXiv:2503.14476, Eq. 12.
    """
    _require_positive(num_tokens=num_tokens)
    return mask.float() / num_tokens


def sequence_mean_weights(
    mask: Bool[Tensor, "N"], sequence_ids: Int[Tensor, "N"], sequence_tokens: Int[Tensor, "B"], *, num_sequences: int
) -> Float[Tensor, "N"]:
    """Weights of a mean over sequences of each sequence's token mean: every sequence counts the same.

        weight[t] = mask[t] / (sequence_tokens[sequence_ids[t]] * num_sequences)

    Args:
        mask: tokens that we train on.
        sequence_ids: which sequence each token belongs to; -1 on shared prompts.
        sequence_tokens: masked tokens of each sequence of the step, over all packs and ranks.
        num_sequences: sequences to average over; one without a masked token adds 0 to the mean if it is counted here.

    Reference: Shao et al. (2024), GRPO, arXiv:2402.03300, Eq. 3.
    """
    _require_positive(num_sequences=num_sequences)
    weights = 1.0 / (sequence_tokens.clamp(min=1).float() * num_sequences)
    return torch.where(mask, on_tokens(weights, sequence_ids, elsewhere=0.0), 0.0)


def constant_weights(mask: Bool[Tensor, "N"], *, num_sequences: int, max_tokens: int) -> Float[Tensor, "N"]:
    """Weights of a sum over tokens divided by a constant: no length, neither a sequence's nor the batch's, has a say.

        weight[t] = mask[t] / (num_sequences * max_tokens)

    Args:
        mask: tokens that we train on.
        num_sequences: sequences of the whole step, over all packs and ranks.
        max_tokens: the completion limit, a constant of the run.

    Reference: Liu et al. (2025), Dr. GRPO, arXiv:2503.20783, Sec. 3.2.
    """
    _require_positive(num_sequences=num_sequences, max_tokens=max_tokens)
    return mask.float() / (num_sequences * max_tokens)


def moments(x: Float[Tensor, "N"], mask: Bool[Tensor, "N"]) -> Float[Tensor, "3"]:
    """Return (count, sum, sum of squares) of the masked values in float64, to be added over packs and ranks."""
    masked = torch.where(mask, x.double(), 0.0)
    return torch.stack([mask.sum().double(), masked.sum(), masked.square().sum()])


def mean_and_variance(totals: Float[Tensor, "3"]) -> tuple[float, float]:
    """Return mean and unbiased variance from added `moments`; 0 where there are too few values."""
    count, total, squares = totals.tolist()
    mean = total / max(count, 1.0)
    return mean, max(squares - count * mean * mean, 0.0) / max(count - 1.0, 1.0)


def _require_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is {count}, and must be at least 1: a step without it has no mean; skip the step")
