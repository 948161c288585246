"""Weights of a model's linear layers set to zero. Embeddings, head, norms and biases stay whole.

A model with half of its weights at zero is not faster by itself: hardware and kernels for 2:4 patterns are. It writes
little that makes sense until it is trained again; `optim.keep_zeros` keeps what is zero at zero.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from alignlab.errors import ConfigError
from alignlab.models.layer_pruning import list_of_layers
from alignlab.models.layer_sharing import refuse_sharing
from alignlab.models.layout import computed_beforehand
from alignlab.models.pruning.calibration import CalibrationText, read, square_sums
from alignlab.models.pruning.masks import Choice, magnitude_scores, wanda_scores


def linear_layers(layer: nn.Module) -> dict[str, nn.Linear]:
    """Return the linear layers of a decoder layer, by name.

    Raises:
        ConfigError: it has experts, whose weights are stacked.
    """
    for module in layer.modules():
        stacked = [p for p in module.parameters(recurse=False) if p.dim() == 3 and not isinstance(module, nn.Conv1d)]
        if stacked:
            raise ConfigError(
                f"weights are set to zero in linear layers, and {type(module).__name__} stacks the weights of its "
                "experts; take a dense model, or make one of a mixture by distillation"
            )
    return {name: module for name, module in layer.named_modules() if isinstance(module, nn.Linear)}


def check_pattern(model: PreTrainedModel, size: int) -> None:
    """Raise unless the inputs of all linear layers divide into groups of `size`.

    Raises:
        ConfigError: naming the first that does not.
    """
    for layer in _layers(model):
        for name, linear in linear_layers(layer).items():
            if linear.in_features % size:
                raise ConfigError(
                    f"a pattern over {size} inputs needs a multiple of {size}, and {name} reads {linear.in_features}; "
                    "use --sparsity, or another pattern"
                )


@torch.no_grad()
def prune_by_magnitude(model: PreTrainedModel, stays: Choice) -> None:
    """Set the smallest weights of each linear layer to zero, in place."""
    for layer in _layers(model):
        for linear in linear_layers(layer).values():
            linear.weight.mul_(stays(magnitude_scores(linear.weight)))


def prune_by_wanda(model: PreTrainedModel, stays: Choice, text: CalibrationText) -> None:
    """Set weights to zero that say least on a text, decoder layer by decoder layer, in place.

    Each layer reads what the layers before it compute once pruned (Wanda, arXiv:2306.11695, Sec. 3): it is computed
    twice, before and after its own pruning, in one pass over the text.
    """
    layers = _layers(model)
    for layer in layers:
        linear_layers(layer)  # refuses, before any weight has changed
    try:
        for layer in layers:
            layer.forward = _pruned_first(layer, layer.forward, stays)
        read(model, text)
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _pruned_first(layer: nn.Module, forward: Callable[..., Any], stays: Choice) -> Callable[..., Any]:
    """Return a layer's `forward` that measures and prunes the layer, and then computes it."""

    def computed(*args: Any, **kwargs: Any) -> Any:
        linears = linear_layers(layer)
        with square_sums(linears) as sums, computed_beforehand():
            forward(*args, **kwargs)
        for name, total in sums.items():
            weight = linears[name].weight
            weight.mul_(stays(wanda_scores(weight, total.sqrt())))
        return forward(*args, **kwargs)

    return computed


def sparsity_of(model: PreTrainedModel) -> tuple[int, int]:
    """Return how many weights of the linear layers are zero, and how many there are."""
    weights = [linear.weight for layer in _layers(model) for linear in linear_layers(layer).values()]
    zeros = torch.stack([(weight == 0).sum() for weight in weights])
    return int(zeros.sum()), sum(weight.numel() for weight in weights)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    refuse_sharing(model.config, what="weights of single layers are set to zero")
    modules: Any = model.get_submodule(list_of_layers(model)[0])
    return list(modules)
