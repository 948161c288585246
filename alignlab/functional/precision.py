"""Float32 inside, and exponentials that cannot overflow."""

import torch
from jaxtyping import Float
from torch import Tensor

MAX_EXPONENT = 20.0
"""Where `clamped_exp` stops growing: e^20 is 4.9e8, far past any ratio that carries information."""


def at_least_float32(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in float32; float64 stays as it is, so that gradients can be checked in it."""
    return x if x.dtype == torch.float64 else x.float()


def clamped_exp(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """exp(min(x, 20)). Where the clamp acts the gradient is 0."""
    return torch.exp(x.clamp(max=MAX_EXPONENT))
