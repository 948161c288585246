"""LoRA layers whose products are computed from matrices in the base model's dtype.

PEFT keeps an adapter's weights in float32, as an optimizer's small updates need, and then multiplies in float32 too,
which is several times slower than bfloat16 where a processor has instructions for it; where it has none, all of the
product is computed in float32 (see `functional.products`). `ComputeDtypeLinear` casts the two small matrices instead,
in one autograd function that saves only the layer's input and the rank-sized product. Each matrix is cast once an
update, where `keep_casts` allows it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.functional import linear

from alignlab.functional.products import product_dtype
from alignlab.models.pieces import piece_of


class _LoraProduct(torch.autograd.Function):
    """y = x W^T + bias + scale * (x A^T) B^T, from matrices in the dtype of W; W and its bias are frozen."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor,
        casts: tuple[Tensor, Tensor], scale: float,
    ) -> Tensor:
        """Map x [..., in], weight [out, in], bias [out], down [rank, in], up [out, rank] -> [..., out].

        Args:
            casts: down and up in the dtype of the weight; without a gradient of their own.
        """
        rows = x.reshape(-1, x.shape[-1])
        low_down, low_up = casts
        compute = product_dtype(rows)
        wide = rows.to(compute)
        inner = wide @ low_down.T.to(compute)
        y = linear(wide, weight.to(compute), None if bias is None else bias.to(compute))
        y.addmm_(inner, low_up.T.to(compute), alpha=scale)
        ctx.save_for_backward(rows, inner.to(x.dtype), weight, low_down, low_up)
        ctx.scale, ctx.dtype = scale, down.dtype
        return y.to(x.dtype).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients of x, down and up; the last two in float32, as the adapter's weights."""
        saved = ctx.saved_tensors
        compute = product_dtype(saved[0])
        rows, inner, weight, low_down, low_up = (tensor.to(compute) for tensor in saved)
        grad_rows = grad.reshape(-1, grad.shape[-1]).to(compute)
        grad_inner = (grad_rows @ low_up).mul_(ctx.scale)
        grad_down = (grad_inner.T @ rows).to(ctx.dtype)
        grad_up = (grad_rows.T @ inner).to(ctx.dtype).mul_(ctx.scale)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad_rows @ weight).addmm_(grad_inner, low_down).to(grad.dtype).view(*grad.shape[:-1], -1)
        return grad_x, None, None, grad_down, grad_up, None, None


class _Casts(NamedTuple):
    """The two matrices of an adapter, what they were at the time, and their copies in another dtype."""

    matrices: tuple[Tensor, Tensor]
    state: tuple[Any, ...]
    copies: tuple[Tensor, Tensor]


class ComputeDtypeLinear(LoraLinear):
    """PEFT's LoRA layer around a frozen `nn.Linear`; any form but plain LoRA is computed by PEFT.

    Attributes:
        keeps_casts: whether copies of the matrices in the base's dtype are kept until the matrices are written to.
    """

    keeps_casts = False

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map x [..., in] -> [..., out]."""
        name = self._plain_adapter(x)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        base: Any = self.get_base_layer()
        down, up = (matrices[name].get_parameter("weight") for matrices in (self.lora_A, self.lora_B))
        casts = self._cast_matrices(name, down, up, base.weight.dtype)
        return _LoraProduct.apply(x, base.weight, base.bias, down, up, casts, self.scaling[name])

    def _cast_matrices(self, name: str, down: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the matrices of an adapter in a dtype: cast now, or before and not written to since."""
        if not self.keeps_casts:
            return down.detach().to(dtype), up.detach().to(dtype)
        casts: dict[str, _Casts] = self.__dict__.setdefault("_casts", {})
        kept = casts.get(name)
        state = (dtype, down._version, up._version, down.data_ptr(), up.data_ptr())
        # The matrices are held, so that no others can have their place in memory.
        if kept is None or kept.state != state or kept.matrices[0] is not down or kept.matrices[1] is not up:
            with torch.inference_mode(False):  # rollouts leave copies that a backward pass may keep
                copies = down.detach().to(dtype), up.detach().to(dtype)
            kept = casts[name] = _Casts((down, up), state, copies)
        return kept.copies

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


def keep_casts(model: nn.Module) -> None:
    """Let the adapters of a model be cast once an update, instead of in every forward and backward pass.

    For adapters whose optimizer marks what it has written to, as `loop.optim.make_optimizer`'s does. Sharded weights
    stay without: what gathers them writes to them without a mark.
    """
    if all(piece_of(parameter) is None for parameter in model.parameters()):
        for module in model.modules():
            if isinstance(module, ComputeDtypeLinear):
                module.keeps_casts = True
