"""AdamW for weights in 16 bits: it updates float32 copies, and rounds them into the weights.

An update is often smaller than half a unit in the last place of such a weight, and would be lost in it
(Micikevicius et al. 2018, arXiv:1710.03740, Sec. 3.1). Gradients are summed in float32 over the packs of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from alignlab.models.pieces import whole_shape
from alignlab.runs.checkpoint import MASTER


def needs_master(parameter: Tensor) -> bool:
    """Return whether small updates of a weight would be lost in its rounding."""
    return parameter.dtype.itemsize < torch.float32.itemsize


def state_bytes(parameter: nn.Parameter) -> int:
    """Return the bytes of the optimizer's state of a weight: two moments and, where it needs one, the copy."""
    width = max(parameter.element_size(), torch.float32.itemsize)
    return (2 + needs_master(parameter)) * whole_shape(parameter).numel() * width


class MasterAdamW(torch.optim.AdamW):
    """AdamW over weights of which some are in 16 bits; arguments are `torch.optim.AdamW`'s.

    The gradients of those weights are accumulated in float32 from here on.
    """

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for parameter in self._parameters():
            if needs_master(parameter):
                parameter.grad_dtype = torch.float32

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the copies by the gradients, and the weights by the copies."""
        assert closure is None, "a closure would compute the loss again"
        for group in self.param_groups:
            changed = [parameter for parameter in group["params"] if parameter.grad is not None]
            if changed:
                self._update(group, changed)

    def _update(self, group: dict[str, Any], changed: list[nn.Parameter]) -> None:
        """Update the weights of a group that have a gradient."""
        states = [self._state_of(parameter, fused=bool(group["fused"])) for parameter in changed]
        masters = [state.get(MASTER, parameter) for state, parameter in zip(states, changed, strict=True)]
        gradients = [parameter.grad for parameter in changed if parameter.grad is not None]
        adamw(
            masters, gradients, [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states], [], [state["step"] for state in states],
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False, foreach=group["foreach"],
            capturable=False, differentiable=False, fused=group["fused"],
        )  # fmt: skip
        for parameter, state in zip(changed, states, strict=True):
            if MASTER in state:
                parameter.copy_(state[MASTER])

    def _state_of(self, parameter: nn.Parameter, *, fused: bool) -> dict[str, Tensor]:
        """Return the state of a weight, made at its first update."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            if needs_master(parameter):
                state[MASTER] = parameter.detach().float()
            exact = state.get(MASTER, parameter)
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(exact), torch.zeros_like(exact)
        return state
