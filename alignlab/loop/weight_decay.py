"""The kinds of weights in training, by which weight decay spares some of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, get_args

from torch import nn

from alignlab.config.trainer import OptimSettings, WeightKind
from alignlab.models.pieces import whole_shape

if TYPE_CHECKING:
    from alignlab.loop.learner import Learner

_NAMES: dict[WeightKind, str] = {
    "matrices": "matrices", "embeddings": "embeddings", "norms": "norms", "biases": "biases", "vectors": "other vectors"
}


def weight_kinds(module: nn.Module) -> dict[nn.Parameter, WeightKind]:
    """Return the kind of each parameter that requires a gradient, in the module's order.

        embeddings   of an embedding layer; a head that is tied to it is the same parameter
        biases       named so, also those of all experts in one matrix
        norms        of a normalisation layer, also those of all attention heads in one matrix
        vectors      with fewer than two dimensions, such as gates and attention sinks
        matrices     all others: projections, experts, untied heads, adapters

    Of a parameter with several names the first one in this list counts that fits any of them.
    """
    kinds: dict[nn.Parameter, WeightKind] = {}
    order = ("embeddings", "biases", "norms", "vectors", "matrices")
    for owner, name, parameter in _trained(module):
        kinds[parameter] = min(kinds.get(parameter, "matrices"), _kind(owner, name, parameter), key=order.index)
    return kinds


def _trained(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield each trained parameter with the layer that it belongs to and its name there; tied ones of each layer."""
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False, remove_duplicate=False):
            if parameter.requires_grad:
                yield owner, name, parameter


def _kind(owner: nn.Module, name: str, parameter: nn.Parameter) -> WeightKind:
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if name.endswith("bias"):
        return "biases"
    if "norm" in type(owner).__name__.lower():
        return "norms"
    return "vectors" if len(whole_shape(parameter)) < 2 else "matrices"


def decay_lines(learners: Mapping[str, Learner]) -> list[str]:
    """Return a description of what decays of each learner's weights; its role comes first, if it has one."""
    lines = []
    for prefix, learner in learners.items():
        role = f"{prefix.removesuffix('-')}: " if prefix else ""
        with learner.module.in_use():
            lines.append(role + describe_weight_decay(learner.module, learner.config.optim))
    return lines


def describe_weight_decay(module: nn.Module, settings: OptimSettings) -> str:
    """Return what decays of a module in training, by kind, and what does not."""
    if settings.weight_decay == 0:
        return "no weight decays"
    by_kind: dict[WeightKind, list[int]] = {kind: [] for kind in get_args(WeightKind)}
    for parameter, kind in weight_kinds(module).items():
        by_kind[kind].append(whole_shape(parameter).numel())
    parts = {
        decays: ", ".join(
            f"{_NAMES[kind]} ({len(sizes)} tensors, {sum(sizes):,} weights)"
            for kind, sizes in by_kind.items() if sizes and (kind in settings.weight_decay_on) is decays
        )
        for decays in (True, False)
    }
    return f"{settings.weight_decay:g} of {parts[True] or 'nothing'}; none of {parts[False] or 'the others'}"
