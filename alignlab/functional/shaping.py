"""Terms added to the reward of a whole completion. [B] tensors, one value a completion."""

from jaxtyping import Float, Int
from torch import Tensor


def overlong_penalty(
    lengths: Int[Tensor, "B"], *, max_tokens: int, buffer_tokens: int, factor: float
) -> Float[Tensor, "B"]:
    """Penalty that grows over the last `buffer_tokens` before the limit, so that length is felt before the cut.

        soft    = max_tokens - buffer_tokens
        penalty = -clip((length - soft) / buffer_tokens, 0, 1) * factor

    Args:
        lengths: tokens of each completion.
        max_tokens: the completion limit.
        buffer_tokens: width of the ramp, 1..max_tokens.
        factor: the penalty at the limit, >= 0, in units of reward.

    Returns:
        [B], from -factor to 0, to be added to the reward.

    Reference: Yu et al. (2025), DAPO, arXiv:2503.14476, Eq. 13.
    """
    if not 1 <= buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens is {buffer_tokens}, and must lie between 1 and max_tokens ({max_tokens})")
    over = (lengths - (max_tokens - buffer_tokens)).float() / buffer_tokens
    return over.clamp(0.0, 1.0) * -factor
