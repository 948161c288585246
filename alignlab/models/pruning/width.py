"""A student with some of a dense teacher's neurons, heads and channels: the same layers, and smaller matrices.

Reference: Muralidharan et al. (2024), Minitron, arXiv:2407.14679. Train it before use, by distillation.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignlab.errors import ConfigError
from alignlab.models.attention import Attention, SlidingAttention
from alignlab.models.config import PolicyConfig
from alignlab.models.layer_pruning import list_of_layers
from alignlab.models.layer_sharing import refuse_sharing
from alignlab.models.layers import FeedForward, PlainFeedForward
from alignlab.models.pruning.importance import Importance
from alignlab.models.transformer import PolicyForCausalLM

_AXES = {
    "embed_tokens": (None, "channels"), "lm_head": (None, "channels"),
    "q_proj": ("queries", "channels"), "k_proj": ("keys", "channels"), "v_proj": ("keys", "channels"),
    "o_proj": ("channels", "queries"),
    "gate_proj": ("neurons", "channels"), "up_proj": ("neurons", "channels"), "down_proj": ("channels", "neurons"),
    "q_norm": (None,), "k_norm": (None,),
}  # fmt: skip
"""What the outputs and inputs of a projection, by its name, are; a norm is of channels."""
_KINDS = (Attention, SlidingAttention, FeedForward, PlainFeedForward)


@dataclass(frozen=True)
class Width:
    """Sizes of a student; None keeps the teacher's.

    Attributes:
        intermediate_size: units of each feed-forward.
        num_key_value_heads: keys of each layer, each with as many query heads as in the teacher.
        hidden_size: channels of the stream.
    """

    intermediate_size: int | None = None
    num_key_value_heads: int | None = None
    hidden_size: int | None = None


def check_width(teacher: PreTrainedModel | PeftModel, width: Width) -> PolicyForCausalLM:
    """Return the teacher, after checking that it can be made narrower, and so narrow.

    Raises:
        ConfigError: a size is not from 1 to the teacher's, or the teacher has parts that are not cut.
    """
    if not isinstance(teacher, PolicyForCausalLM):
        raise ConfigError(
            f"widths are cut of a model of a family that alignlab knows, and this is {type(teacher).__name__}; use "
            "--layers or --num-layers"
        )
    refuse_sharing(teacher.config, what="widths are cut of single layers")
    for name, value in vars(width).items():
        most = getattr(teacher.config, name)
        if value is not None and not 1 <= value <= most:
            raise ConfigError(f"{name} is {value}, and must be from 1 to the teacher's {most}; change it")
    prefix, _ = list_of_layers(teacher)
    for layer in teacher.get_submodule(prefix).children():
        _check_layer(layer)
    for name, _ in teacher.named_parameters():
        _axes_of(name)
    return teacher


def _check_layer(layer: nn.Module) -> None:
    """Raise a ConfigError if a layer has parts that are not cut."""
    for name, part in layer.named_children():
        if name.endswith("layernorm"):
            continue
        if type(part) not in _KINDS or getattr(part, "fused", False) or getattr(part, "norms_all_heads", False):
            raise ConfigError(
                "widths are cut of attention and feed-forwards of separate matrices, whose heads are normed one by one "
                f"if at all, and the teacher has {type(part).__name__} of another form; use --num-layers"
            )


@torch.no_grad()
def narrowed(teacher: PolicyForCausalLM, width: Width, importance: Importance) -> PolicyForCausalLM:
    """Return a copy of a teacher, in its dtype and in evaluation mode, with its most important parts.

    With the teacher's own sizes it computes what the teacher computes. What stays keeps its order, so that positions
    rotate the heads as before.

    Args:
        teacher: that `check_width` accepts.
        importance: of the teacher's parts.
    """
    config = _narrow_config(teacher.config, width)
    head_size, num_groups = config.head_dim, config.num_key_value_heads
    assert head_size is not None and num_groups is not None
    queries = config.num_attention_heads // num_groups * head_size
    groups = [_highest(scores, num_groups) for scores in importance.groups]
    kept = {
        "neurons": [_highest(scores, config.intermediate_size) for scores in importance.neurons],
        "keys": [_spread(group, head_size) for group in groups],
        "queries": [_spread(group, queries) for group in groups],
        "channels": [_highest(importance.channels, config.hidden_size)] * len(groups),
    }
    student: Any = PolicyForCausalLM(config)
    student.to(teacher.dtype)
    student.load_state_dict(_cut_weights(teacher, kept))
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    result: PolicyForCausalLM = student.to(teacher.device).eval()
    return result


def _cut_weights(teacher: PolicyForCausalLM, kept: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Return copies of a teacher's weights with the indices that stay; `kept` has those of each layer, by axis."""
    prefix, _ = list_of_layers(teacher)
    weights = {}
    for name, tensor in teacher.state_dict().items():
        index, _, inside = name.removeprefix(f"{prefix}.").partition(".")
        layer = int(index) if inside and index.isdigit() else 0
        for dim, axis in enumerate(_axes_of(name)[: tensor.dim()]):
            if axis is not None:
                tensor = tensor.index_select(dim, kept[axis][layer].to(tensor.device))
        weights[name] = tensor.clone()
    return weights


def _narrow_config(teacher: PolicyConfig, width: Width) -> PolicyConfig:
    config = copy.deepcopy(teacher)
    assert teacher.num_key_value_heads is not None
    sizes: dict[str, Any] = {name: value for name, value in vars(width).items() if value is not None}
    if width.num_key_value_heads is not None:
        per_group = teacher.num_attention_heads // teacher.num_key_value_heads
        sizes["num_attention_heads"] = per_group * width.num_key_value_heads
    for name, value in sizes.items():
        setattr(config, name, value)
    config.name_or_path = ""  # the student is in no checkpoint yet
    if config.hub_config is not None:
        config.hub_config = {**config.hub_config, **sizes, "head_dim": config.head_dim}
    return config


def _axes_of(name: str) -> tuple[str | None, ...]:
    """Return what the dimensions of a parameter are: "channels", "neurons", "queries", "keys", or None to keep all."""
    owner, kind = name.split(".")[-2:]
    if owner.endswith("norm") and owner not in _AXES:
        return ("channels",)
    if owner not in _AXES or kind not in ("weight", "bias"):
        raise ConfigError(f"widths are cut of projections and norms, and the teacher has {name}; use --num-layers")
    return _AXES[owner]


def _highest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the `count` highest scores, ascending; the first among equals."""
    order = scores.argsort(descending=True, stable=True)[:count]
    return order.sort().values


def _spread(groups: Tensor, size: int) -> Tensor:
    """Return the indices of all numbers of some groups of `size`."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


