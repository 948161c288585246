"""LoRA layers whose products are computed in the base model's dtype.

PEFT keeps an adapter's weights in float32, as an optimizer's small updates need, and then multiplies in float32 too,
which is several times slower than bfloat16. `ComputeDtypeLinear` casts the two small matrices instead, in one autograd
function that saves only the layer's input and the rank-sized product.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + bias + scale * (x A^T) B^T, products in the dtype of W; W and its bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
    ) -> Tensor:
        """Map x [..., in], weight [out, in], bias [out], down [rank, in], up [out, rank] -> [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        low_down, low_up = down.to(weight.dtype), up.to(weight.dtype)
        inner = rows @ low_down.T
        y = linear(rows, weight, bias).addmm_(inner, low_up.T, alpha=scale)
        ctx.save_for_backward(rows, inner, weight, down, up)
        ctx.scale = scale
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of x, down and up; the last two in float32, as the adapter's weights."""
        rows, inner, weight, down, up = ctx.saved_tensors
        grad_rows = grad.reshape(-1, grad.shape[-1])
        grad_inner = (grad_rows @ up.to(weight.dtype)).mul_(ctx.scale)
        grad_down = (grad_inner.T @ rows).to(down.dtype)
        grad_up = (grad_rows.T @ inner).to(up.dtype).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_inner, down.to(weight.dtype)).view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_down, grad_up, None


class ComputeDtypeLinear(LoraLinear):
    """PEFT's LoRA layer around a frozen `nn.Linear`; any form but plain LoRA is computed by PEFT."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x [..., in] -> [..., out]."""
        name = self._plain_adapter(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base, down, up = self.get_base_layer(), self.lora_A[name].weight, self.lora_B[name].weight
        return _LoraProduct.apply(x, base.weight, base.bias, down, up, self.scaling[name])

    def _plain_adapter(self, x: Tensor) -> str | None:
        """Return the active adapter if it is the only one, and plain LoRA on a frozen layer of the input's dtype."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if self.disable_adapters or self.merged or len(names) != 1 or not _is_plain(self):
            return None
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):  # PEFT's products follow the casts of autocast
            return None
        has_dropout = self.training and not isinstance(self.lora_dropout[names[0]], nn.Identity)
        return None if has_dropout or not _is_frozen_linear(self.get_base_layer(), x.dtype) else names[0]


def _is_frozen_linear(base: nn.Module, dtype: torch.dtype) -> bool:
    return type(base) is nn.Linear and not base.weight.requires_grad and base.weight.dtype == dtype


def _is_plain(layer: LoraLinear) -> bool:
    """Return True if the adapters are low-rank terms and nothing else."""
    return not (layer.lora_variant or layer.fan_in_fan_out or any(layer.lora_bias.values()))
