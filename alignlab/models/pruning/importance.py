"""The importance of the neurons, heads and channels of a dense model of ours, measured on a text.

Reference: Muralidharan et al. (2024), Minitron, arXiv:2407.14679, Sec. 2.2, with means of magnitudes over tokens.
"""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor, nn

from alignlab.models.layer_pruning import list_of_layers
from alignlab.models.pruning.calibration import CalibrationText, read
from alignlab.models.transformer import PolicyForCausalLM


class Importance(NamedTuple):
    """Scores; what scores lowest is dropped first.

    Attributes:
        neurons: for each layer [I], the mean magnitude of a unit of its feed-forward.
        groups: for each layer [K], of the heads that share a key: the mean norm of their output.
        channels: [D], of the stream: the mean magnitude of what the layers' norms make of it, summed over the norms.
    """

    neurons: list[Tensor]
    groups: list[Tensor]
    channels: Tensor


def importance_of(model: PolicyForCausalLM, text: CalibrationText) -> Importance:
    """Compute a model on a text, and return the scores of its parts."""
    layers: Any = model.get_submodule(list_of_layers(model)[0])
    neurons: list[Tensor] = []
    groups: list[Tensor] = []
    norms: list[Tensor] = []
    num_groups = model.config.num_key_value_heads
    assert num_groups is not None
    with ExitStack() as hooks:
        for layer in layers:
            down, out = layer.mlp.down_proj, layer.self_attn.o_proj
            hooks.callback(down.register_forward_pre_hook(partial(_add_neurons, neurons)).remove)
            hooks.callback(out.register_forward_pre_hook(partial(_add_groups, groups, num_groups)).remove)
            for norm in (module for name, module in layer.named_children() if name.endswith("layernorm")):
                hooks.callback(norm.register_forward_hook(partial(_add_channels, norms)).remove)
        read(model, text)
    return Importance(neurons, groups, sum(norms[1:], start=norms[0]))


def _add_neurons(found: list[Tensor], module: nn.Module, args: tuple[Any, ...]) -> None:
    found.append(args[0].float().flatten(0, -2).abs().mean(0))


def _add_groups(found: list[Tensor], num_groups: int, module: nn.Module, args: tuple[Any, ...]) -> None:
    found.append(args[0].float().flatten(0, -2).unflatten(-1, (num_groups, -1)).norm(dim=-1).mean(0))


def _add_channels(found: list[Tensor], module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
    found.append(output.float().flatten(0, -2).abs().mean(0))
