"""Models whose weights were rounded and then stand there as ordinary numbers."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from alignlab.config.rollout import RolloutSettings, rounded_weights
from alignlab.config.weight_rounding import Int4Weights
from alignlab.models.moe import Experts
from alignlab.models.weight_rounding import BITS, rounded_weight


def rounded_model(model: PreTrainedModel, settings: RolloutSettings) -> PreTrainedModel:
    """A copy of a plain model with its linear layers and experts rounded as the engine's settings say."""
    rounding = rounded_weights(settings)
    assert rounding is not None
    group = rounding.group if isinstance(rounding, Int4Weights) else None
    twin = copy.deepcopy(model)
    twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())
    for name, module in twin.named_modules():
        is_left = any(f".{part}." in f".{name}." for part in rounding.exact)
        if not isinstance(module, nn.Linear | Experts) or is_left or name.endswith("shared_expert_gate"):
            continue
        for weight in module.parameters(recurse=False):
            if weight.dim() > 1:
                rows = weight.detach().flatten(0, -2)
                with torch.no_grad():
                    weight.copy_(rounded_weight(rows, BITS[rounding.type], group).view_as(weight))
    return twin
