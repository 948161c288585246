"""The states that layers keep of each sequence, whatever its length: tensors with a slot for each sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from alignlab.models.cache_spec import LayerCacheSpec
from alignlab.models.recurrent.runs import Entries, Runs


class StateCache:
    """Tensors by layer and name, allocated when a layer first reads; all slots are zero then.

    Args:
        specs: of the layers that keep entries of sequences, by `layer_idx`.
        dtype: of the model.

    Attributes:
        num_slots: of sequences.
        layers: [slots, ...] by layer and name.
    """

    def __init__(self, specs: Mapping[int, LayerCacheSpec], dtype: torch.dtype) -> None:
        self._specs = {layer_idx: spec for layer_idx, spec in specs.items() if spec.per_sequence}
        self._dtype = dtype
        self.num_slots = self._total_slots = 0
        self.layers: dict[int, dict[str, Tensor]] = {}

    def __bool__(self) -> bool:
        """Return whether any layer keeps entries of sequences."""
        return bool(self._specs)

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot, over all layers."""
        return sum(spec.sequence_bytes(self._dtype) for spec in self._specs.values())

    def tensors(self) -> list[Tensor]:
        """Return all that is kept, [slots, numbers of a slot]."""
        return [tensor.flatten(1) for layer in self.layers.values() for tensor in layer.values()]

    def resize(self, num_slots: int, *, num_more: int = 0) -> None:
        """Drop all entries, and have `num_slots` slots of sequences, then `num_more` that no sequence uses."""
        self.layers = {}
        self.num_slots, self._total_slots = num_slots, num_slots + num_more

    def read(self, layer_idx: int, slots: Tensor) -> dict[str, Tensor]:
        """Return a layer's entries at slots [R], [R, ...] by name."""
        tensors = self.layers.get(layer_idx)
        if tensors is None:
            entries = self._specs[layer_idx].sequence_entries(self._dtype)
            tensors = self.layers[layer_idx] = {
                name: torch.zeros(self._total_slots, *shape, dtype=dtype, device=slots.device)
                for name, shape, dtype in entries
            }
        return {name: tensor.index_select(0, slots) for name, tensor in tensors.items()}

    def write(self, layer_idx: int, slots: Tensor, entries: Entries) -> None:
        """Store a layer's entries [R, ...] at slots [R]."""
        tensors = self.layers[layer_idx]
        assert entries.keys() == tensors.keys()
        for name, entry in entries.items():
            tensors[name].index_copy_(0, slots, entry)


@dataclass(frozen=True)
class StepStates:
    """The states of the sequences of one step.

    Attributes:
        cache: entries of all layers.
        slots: [2,R] int64, where each sequence's entries are read and written.
        lengths: tokens of the sequences that go on by several, which come last.
    """

    cache: StateCache
    slots: Tensor
    lengths: tuple[int, ...]

    @cached_property
    def runs(self) -> Runs:
        """The step's tokens, by sequence."""
        return Runs(self.slots.shape[1] - len(self.lengths), self.lengths, self.slots.device)


class StateBatch:
    """The part of a `layout` that recurrent layers are given.

    Args:
        states: of the step's sequences; None where no layer keeps any.
    """

    def __init__(self, states: StepStates | None) -> None:
        self._states = states

    @property
    def runs(self) -> Runs:
        """The step's tokens, by sequence."""
        assert self._states is not None
        return self._states.runs

    def states(self, layer_idx: int) -> dict[str, Tensor]:
        """Return what a layer has kept of each sequence, [R, ...] by name."""
        assert self._states is not None
        return self._states.cache.read(layer_idx, self._states.slots[0])

    def keep_states(self, layer_idx: int, entries: Entries) -> None:
        """Keep what a layer has made of each sequence, [R, ...] by name."""
        assert self._states is not None
        self._states.cache.write(layer_idx, self._states.slots[1], entries)
