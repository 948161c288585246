"""The small layers that the decoder and its experts share: RMSNorm and the SwiGLU feed-forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)). Reference: Shazeer (2020), arXiv:2002.05202."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
