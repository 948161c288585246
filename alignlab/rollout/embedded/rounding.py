"""The layers of a policy that are rounded for the engine.

Shapes: I inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from alignlab.config.rollout import EngineSettings, rounded_weights
from alignlab.config.weight_rounding import Int4Weights, RoundedWeights
from alignlab.errors import ConfigError
from alignlab.models.decoder import causal_lm
from alignlab.models.merging import base_module, wrappers
from alignlab.models.moe import Experts
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.weight_rounding import BITS
from alignlab.rollout.embedded.weight_readers import layers_read

_ROUTER_PARTS = ("shared_expert_gate",)


class Rounding(NamedTuple):
    """A rounding of the engine's weights.

    Attributes:
        settings: bits, groups, and the layers that stay as they are.
        layers: the policy's layers that are rounded, with any adapters around them.
    """

    settings: RoundedWeights
    layers: frozenset[nn.Module]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return BITS[self.settings.type]

    @property
    def group(self) -> int | None:
        """Inputs that share a scale; None for all of an output."""
        return self.settings.group if isinstance(self.settings, Int4Weights) else None

    @property
    def total_bytes(self) -> int:
        """Bytes of all rounded weights."""
        return sum(self.num_bytes(weight) for layer in self.layers for weight in weights_of(layer))

    def num_bytes(self, weight: Tensor) -> int:
        """Return the bytes of the codes and scales of a weight [..., I]."""
        num_scales = weight.numel() // (self.group or weight.shape[-1])
        return weight.numel() * self.bits // 8 + num_scales * weight.element_size()


def make_rounding(model: nn.Module, settings: EngineSettings, device: torch.device) -> Rounding | None:
    """Return the rounding of an engine's weights; None if the settings ask for none.

    Args:
        model: the policy.
        device: of the engine.

    Raises:
        ConfigError: the engine is on a GPU, the model is not one of ours, a name of `exact` is no layer's, every layer
            is left exact, or groups do not divide a layer's inputs.
    """
    rounding = rounded_weights(settings)
    if rounding is None:
        return None
    setting = f"rollout.quantization is {rounding.type}"
    if device.type != "cpu":
        raise ConfigError(
            f"{setting}, and must be null on a GPU, where the embedded engine has no products of rounded weights; "
            "remove it, or use rollout.engine: vllm with quantization: fp8"
        )
    lm = causal_lm(model)
    if not isinstance(lm, PolicyForCausalLM):
        raise ConfigError(
            f"{setting}, and the model must be one of our own: {type(lm).__name__} may read a layer's weight by "
            "itself; remove it"
        )
    layers = dict(_roundable(model))
    exact = _left_exact(layers, rounding.exact)
    rounded = {name: layer for name, layer in layers.items() if name not in exact}
    if not rounded:
        raise ConfigError(f"{setting}, and quantization.exact leaves every layer as it is; remove some of its names")
    if isinstance(rounding, Int4Weights):
        _check_groups(rounded, rounding.group)
    return Rounding(rounding, frozenset(rounded.values()))


def _roundable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield names and layers, with any adapters around them: the decoder's linear layers and experts, and the head."""
    lm = causal_lm(model)
    decoder: Any = lm.get_decoder()
    head = lm.get_output_embeddings()
    candidates = {module for layer in decoder.layers for module in layer.modules()} | {head}
    candidates -= layers_read(lm.modules())
    adapted = wrappers(model)
    wrapper = ""  # name of the last layer with adapters around it, whose inner modules are not looked at
    for name, module in lm.named_modules():
        if module not in candidates or (wrapper and name.startswith(f"{wrapper}.")):
            continue
        if name in adapted:
            wrapper = name
        base = base_module(module) if name in adapted else module
        if type(base) in (nn.Linear, Experts) and name.rpartition(".")[2] not in _ROUTER_PARTS:
            yield name, module


def _left_exact(layers: Iterable[str], parts: Sequence[str]) -> set[str]:
    """Return the names of layers that have one of the given parts.

    Raises:
        ConfigError: no layer has a part.
    """
    exact: set[str] = set()
    for part in parts:
        matching = [layer for layer in layers if f".{part}." in f".{layer}."]
        if not matching:
            names = sorted({layer.rpartition(".")[2] for layer in layers})
            raise ConfigError(
                f"rollout.quantization.exact has {part!r}, and must have parts of the names of linear layers, such as "
                f"{', '.join(names)}; remove it"
            )
        exact |= set(matching)
    return exact


def _check_groups(layers: dict[str, nn.Module], group: int) -> None:
    """Raise a ConfigError if groups do not divide the inputs of a layer."""
    for name, layer in layers.items():
        for weight in weights_of(layer):
            if weight.shape[-1] % group:
                raise ConfigError(
                    f"rollout.quantization.group is {group}, and must divide the inputs of each rounded layer; {name} "
                    f"has {weight.shape[-1]}; use another, or leave the layer as it is: exact: "
                    f"[lm_head, {name.rpartition('.')[2]}]"
                )


def check_torch_rounds(rounding: Rounding, reason: str) -> None:
    """Raise if torch's products, which compute without the native step, do not cover the rounded layers.

    Args:
        reason: that the native step does not compute.

    Raises:
        ConfigError: experts are to be rounded.
    """
    if any(isinstance(base_module_of(layer), Experts) for layer in rounding.layers):
        raise ConfigError(
            f"rollout.quantization is {rounding.settings.type}, and rounded experts are computed by the native step "
            f"alone, but {reason}; change that, or leave them as they are: exact: [lm_head, experts]"
        )


def weights_of(layer: nn.Module) -> list[Tensor]:
    """Return the weights [..., I] of a linear layer or of experts, without those of adapters."""
    base: Any = base_module_of(layer)
    return [weight for weight in base.parameters(recurse=False) if weight.dim() > 1]


def base_module_of(layer: nn.Module) -> nn.Module:
    """Return a layer without any adapters around it."""
    return layer if type(layer) in (nn.Linear, Experts) else base_module(layer)
