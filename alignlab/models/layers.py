"""The small layers that the decoder and its experts share: norms and feed-forwards, by the names that a config has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from alignlab.models.config import PolicyConfig

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "relu": F.relu,
}  # fmt: skip
"""By `hidden_act`."""

_TORCH_IS_FASTER = 2**18  # elements: on a CPU torch's own norm wins on the few rows of a decoding step, not beyond


class _CPUNorm(torch.autograd.Function):
    """RMSNorm for a CPU, where torch has no fused backward: half as many passes over the data as autograd's.

    With h = x / rms(x) and u = gradient * weight: dx = (u - h mean(u h)) / rms(x), dweight = sum(gradient * h).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Map x [..., D], weight [D] -> [..., D]."""
        normed = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        inverse_rms = torch.linalg.vecdot(normed, normed).unsqueeze_(-1).div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse_rms)
        return normed.mul_(inverse_rms).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Return gradients of x and, if it is trained, of the weight."""
        x, weight, inverse_rms = ctx.saved_tensors
        normed = x * inverse_rms
        scaled = grad.to(normed.dtype, copy=True)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = (scaled * normed).flatten(0, -2).sum(0).to(weight.dtype)
        scaled.mul_(weight)
        overlap = torch.linalg.vecdot(scaled, normed).unsqueeze_(-1).div_(-x.shape[-1])
        return scaled.addcmul_(normed, overlap).mul_(inverse_rms).to(x.dtype), grad_weight, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, float32 inside, rounded once.

    Reference: Zhang and Sennrich (2019), arXiv:1910.07467.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and (torch.is_grad_enabled() or x.numel() > _TORCH_IS_FASTER):
            return _CPUNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"


class ZeroCenteredRMSNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight), float32 inside, rounded once; the weight starts at 0.

    Reference: Gemma Team (2024), arXiv:2408.00118, as its implementation has it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size, eps)
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        # 1 + weight is not rounded to 16 bits, which would lose what the weight says near 0.
        exact = torch.promote_types(x.dtype, torch.float32)
        scale = 1.0 + self.weight.to(exact)
        if x.device.type == "cpu" and (torch.is_grad_enabled() or x.numel() > _TORCH_IS_FASTER):
            return _CPUNorm.apply(x, scale, self.eps)
        return F.rms_norm(x.to(exact), scale.shape, scale, self.eps).to(x.dtype)


NORMS: dict[str, Callable[..., nn.Module]] = {
    "rmsnorm": RMSNorm, "zero_centered_rmsnorm": ZeroCenteredRMSNorm, "layernorm": nn.LayerNorm,
}  # fmt: skip
"""By `norm_type`; called with a size and an epsilon. LayerNorm has a bias: Ba et al. (2016), arXiv:1607.06450."""


def make_norm(config: PolicyConfig, size: int, eps: float | None = None) -> nn.Module:
    """Return a norm over `size` numbers, of the type that the config names.

    Args:
        eps: added to the mean of squares, or to the variance; default: `config.rms_norm_eps`.
    """
    return NORMS[config.norm_type](size, eps=config.rms_norm_eps if eps is None else eps)


def clamped_swiglu(gate: Tensor, up: Tensor, *, limit: float, alpha: float) -> Tensor:
    """Return g sigmoid(alpha g) (u + 1) with g = min(gate, limit) and u = up cut to [-limit, limit], elementwise.

    Reference: OpenAI (2025), gpt-oss-120b & gpt-oss-20b Model Card, arXiv:2508.10925, Sec. 2.2.
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


class FeedForward(nn.Module):
    """A gated feed-forward, down(activation(gate(x)) * up(x)): SwiGLU with silu, GeGLU with gelu, ReGLU with relu.

    Reference: Shazeer (2020), arXiv:2002.05202.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class FusedFeedForward(nn.Module):
    """A gated feed-forward whose gate and up projections are one matrix, the gate's rows first, as Phi-3 has it."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.activation(gate) * up)


class PlainFeedForward(nn.Module):
    """A feed-forward of two matrices, down(activation(up(x))). Reference: Vaswani et al. (2017), arXiv:1706.03762."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.up_proj(x)))


def make_feed_forward(config: PolicyConfig) -> nn.Module:
    """Return the feed-forward of a dense layer, of the kind that the config names."""
    gated = FusedFeedForward if config.fused_projections else FeedForward
    kind = gated if config.mlp_gated else PlainFeedForward
    return kind(config.hidden_size, config.intermediate_size, activation=config.hidden_act, bias=config.mlp_bias)
