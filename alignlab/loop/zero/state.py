"""What a rank holds of the optimizer's state under ZeRO: read, and put back, to the bit.

DeepSpeed lays the weights that a rank updates end to end in flat tensors, in float32, and its optimizer keeps moments
of those. Which elements of which weight are where is read from what DeepSpeed keeps for its own checkpoints; these
names are not public, and the versions that have them are in `installation.TESTED`. Its checkpoints themselves are
pickles, and belong to one number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alignlab.loop.master_weights import needs_master
from alignlab.loop.zero.root import ZeroRoot
from alignlab.models.pieces import Held, Piece, whole_shape
from alignlab.runs.checkpoint import MASTER, STEP, check_optimizer_tensors
from alignlab.runs.tensor_groups import elements_of

MOMENTS = ("exp_avg", "exp_avg_sq")


def state_tensors(root: ZeroRoot, trained: Mapping[str, nn.Parameter]) -> dict[str, Held]:
    """Return what this rank holds of the state of a role's optimizer, by the names of `runs.checkpoint`.

    Args:
        trained: the parameters of the role, by name.
    """
    tensors: dict[str, Held] = {}
    if not root.is_made:
        return tensors
    for name, parameter in trained.items():
        place = _place_of(root, parameter)
        state = root.state.get(place.flat, {})
        for key in MOMENTS if state else ():
            tensors[f"{key}.{name}"] = place.piece(state[key])
        if state:
            tensors[f"{STEP}.{name}"] = state[STEP]
        if state and needs_master(parameter):
            tensors[f"{MASTER}.{name}"] = place.piece(place.flat)
    return tensors


@torch.no_grad()
def load_state(root: ZeroRoot, trained: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    """Put the state of a role's optimizer back, and take over the weights as they are now.

    Raises:
        CheckpointError: an entry belongs to no parameter, or has another shape than its parameter.
    """
    check_optimizer_tensors(trained, tensors)
    for name, parameter in trained.items():
        place = _place_of(root, parameter)
        if f"{MASTER}.{name}" in tensors:
            copy = place.piece(place.flat)
            copy.values.copy_(elements_of(tensors, f"{MASTER}.{name}", copy))
        else:
            place.take_weights(parameter)
        if f"{STEP}.{name}" not in tensors:
            root.state.pop(place.flat, None)
            continue
        if not root.state.get(place.flat):
            root.state[place.flat] = {key: torch.zeros_like(place.flat) for key in MOMENTS}
        state = root.state[place.flat]
        # A count of steps is on the tensor's device for the fused kernel alone, which every trained role has.
        state[STEP] = tensors[f"{STEP}.{name}"].to(place.flat.device, torch.float32, copy=True)
        for key in MOMENTS:
            piece = place.piece(state[key])
            piece.values.copy_(elements_of(tensors, f"{key}.{name}", piece))


class _Place:
    """Where a parameter's elements lie on this rank, in a flat float32 tensor.

    Attributes:
        flat: the tensor; where this rank has none of the parameter's elements, one of the same group.
        start: index of the first element there.
        first: index of that element in the parameter.
        count: number of elements, perhaps 0.
    """

    def __init__(self, flat: Tensor, start: int, first: int, count: int, shape: torch.Size) -> None:
        self.flat, self.start, self.first, self.count, self._shape = flat, start, first, count, shape

    def piece(self, flat: Tensor) -> Piece:
        """Return the parameter's piece of a tensor that is laid out like `flat`."""
        return Piece(flat.detach()[self.start : self.start + self.count], self.first, self._shape)

    def take_weights(self, parameter: nn.Parameter) -> None:
        """Copy the parameter's present values into the float32 copy that is updated."""
        present = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.detach().view(-1)[self.first :]
        self.piece(self.flat).values.copy_(present[: self.count])


def _place_of(root: ZeroRoot, parameter: nn.Parameter) -> _Place:
    return _place_in_stage_3(root, parameter) if root.spreads_weights else _place_in_stages_1_and_2(root, parameter)


def _place_in_stage_3(root: ZeroRoot, parameter: Any) -> _Place:
    zero = root.optimizer
    group, start, size = zero.grad_position[zero.get_param_id(parameter)]
    shape = whole_shape(parameter)
    first = min(size * dist.get_rank(), shape.numel())
    return _Place(zero.fp32_partitioned_groups_flat[group], start, first, min(size, shape.numel() - first), shape)


def _place_in_stages_1_and_2(root: ZeroRoot, parameter: Any) -> _Place:
    zero = root.optimizer
    mapping = parameter._hp_mapping
    if mapping is None:
        [group] = [i for i, members in enumerate(zero.bit16_groups) if any(m is parameter for m in members)]
        return _Place(zero.single_partition_of_fp32_groups[group], 0, 0, 0, parameter.shape)
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    return _Place(
        flat, mapping.hp_fragment_address.start, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel,
        parameter.shape,
    )
