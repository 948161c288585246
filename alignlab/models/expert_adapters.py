"""Adapters on the experts of a mixture, whose weights are stacked parameters [E, out, in] instead of linear layers.

PEFT adapts such parameters by name (`target_parameters`): expert e computes with W_e + scale * B_e A_e. PEFT builds
that sum for all experts in each forward pass; `GroupedExperts` multiplies by the low-rank matrices instead.
"""

from __future__ import annotations

import re
from typing import Any, cast

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from alignlab.models.moe import Experts, LowRank


class GroupedExperts(ParamWrapper):
    """PEFT's wrapper of one stacked parameter of our `Experts`; wrappers of several parameters are nested."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the experts; see `Experts.forward`."""
        low_rank = None if kwargs else self._low_rank(x)
        if low_rank is None:
            return super().forward(x, *args, **kwargs)
        return cast(Tensor, self.get_base_layer()(x, *args, low_rank=low_rank))

    def _low_rank(self, x: Tensor) -> dict[str, LowRank] | None:
        """Return the terms of all nested wrappers; None for a form that only PEFT's own forward computes."""
        if type(self.get_base_layer()) is not Experts or torch.is_autocast_enabled(x.device.type):
            return None
        terms: dict[str, LowRank] = {}
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            names = [name for name in layer.active_adapters if name in layer.lora_A]
            if layer.merged or len(names) > 1:
                return None
            if names and not layer.disable_adapters:
                up, down, scale = layer.get_delta_factors(names[0])
                terms[layer.parameter_name] = LowRank(down, up, scale)
            layer = layer.base_layer
        return terms


GroupedExperts.__name__ = ParamWrapper.__name__  # PEFT looks wrappers up by this name


def stacked_experts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters [E, ..., ...] of a mixture that hold all experts of a layer, by name."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if re.search(r"(^|\.)experts$", re.sub(r"\.base_layer", "", name))
        for key, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3
    }


def expert_targets(model: nn.Module) -> list[str]:
    """PEFT's `target_parameters` for all experts: the ends of their names, such as mlp.experts.down_proj."""
    return sorted({".".join(name.split(".")[-3:]) for name in stacked_experts(model)})


def share_of_experts(model: nn.Module) -> float:
    """Return the fraction of the model's weights that are in stacked experts."""
    total = sum(parameter.numel() for parameter in model.parameters())
    return sum(parameter.numel() for parameter in stacked_experts(model).values()) / max(total, 1)
