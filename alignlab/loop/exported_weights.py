"""The weights that a run results in, where they are not those of its last step."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from alignlab.models.weight_view import WeightView


class ReplacedWeights:
    """A view of weights of which some are read elsewhere; a `WeightView` for one rank.

    Args:
        weights: the view, which this rank reads without any other.
        tensors: what is read instead, by name; in any float dtype, on any device.
        names: name in `tensors` of each replaced weight; tied weights share one.
    """

    def __init__(self, weights: WeightView, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._weights, self._tensors, self._names = weights, tensors, names

    def names(self) -> tuple[str, ...]:
        """Return the names of the view."""
        return self._weights.names()

    def whole(self, name: str) -> Tensor:
        """Return a tensor in the dtype and on the device of the weight that it replaces."""
        if name not in self._names:
            return self._weights.whole(name)
        present = self._weights.local(name)
        return self._tensors[self._names[name]].to(present.device, present.dtype)

    def local(self, name: str) -> Tensor:
        """Return what `whole` returns."""
        return self.whole(name)

    def empty(self, name: str) -> Tensor:
        """Return one tensor without numbers."""
        return self._weights.empty(name)


def replaced_weights(module: nn.Module, weights: WeightView, tensors: Mapping[str, Tensor]) -> ReplacedWeights:
    """Return a module's weights with others in place of those that a group of tensors holds.

    Args:
        weights: view of `module`; see `ReplacedWeights`.
        tensors: by the names of parameters, tied ones under their first name, and of buffers.
    """
    first_names = {parameter: name for name, parameter in module.named_parameters()}
    parameters = {name: first_names[p] for name, p in module.named_parameters(remove_duplicate=False)}
    names = parameters | {name: name for name, _ in module.named_buffers()}
    return ReplacedWeights(weights, tensors, {name: known for name, known in names.items() if known in tensors})
