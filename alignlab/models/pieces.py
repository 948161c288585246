"""The part of a tensor that this rank holds, where the ranks share the memory of a tensor out among them.

FSDP2 gives each rank some rows, in a `DTensor`. DeepSpeed gives it some elements of the tensor's flat order: of a
weight under ZeRO stage 3, whose parameter is empty beside them, and of the optimizer's state under stages 1 to 3. Rows
are elements too, so that one description serves both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class Piece:
    """Elements of a tensor.

    Attributes:
        values: [n], in the tensor's flat order; memory of the tensor itself, unless it was copied.
        start: index of the first.
        shape: of the whole tensor.
    """

    values: Tensor
    start: int
    shape: torch.Size

    def clone(self) -> Piece:
        """Return a copy in memory of its own."""
        return replace(self, values=self.values.detach().clone())


Held = Tensor | Piece
"""A tensor that this rank holds whole, or its piece of one."""


def piece_of(tensor: Tensor) -> Piece | None:
    """Return this rank's piece of a tensor; None of a tensor that each rank holds whole."""
    if isinstance(tensor, DTensor):
        rows, first = rows_of(tensor)
        return Piece(rows.detach().view(-1), first * _row_size(tensor), tensor.shape)
    if is_partitioned(tensor):
        own, count = _ds(tensor).ds_tensor.detach(), int(_ds(tensor).ds_numel)
        start = min(own.numel() * dist.get_rank(), count)
        return Piece(own[: count - start], start, torch.Size(_ds(tensor).ds_shape))  # the last parts may be padded
    return None


def held(tensor: Held) -> Tensor:
    """Return what this rank holds of a tensor: all of it, or the elements [n] of its piece."""
    piece = tensor if isinstance(tensor, Piece) else piece_of(tensor)
    if piece is not None:
        return piece.values
    assert isinstance(tensor, Tensor)
    return tensor


def rows_of(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the rows of a tensor that this rank holds, sharing its memory, and the index of the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    # FSDP divides dimension 0 into equal parts, of which the last ones may be shorter, or empty.
    part = -(-tensor.shape[0] // tensor.device_mesh.size())
    return tensor.to_local(), min(part * tensor.device_mesh.get_local_rank(), tensor.shape[0])


def is_partitioned(tensor: Tensor) -> bool:
    """Return whether a parameter is empty, and each rank holds a piece of it: ZeRO stage 3."""
    return hasattr(tensor, "ds_tensor")


def is_gathered(tensor: Tensor) -> bool:
    """Return whether a partitioned parameter is whole at present beside this rank's piece, as small ones may stay."""
    return is_partitioned(tensor) and tensor.numel() == _ds(tensor).ds_numel


def whole_shape(tensor: Held) -> torch.Size:
    """Return the shape of the whole tensor."""
    if isinstance(tensor, Piece):
        return tensor.shape
    return torch.Size(_ds(tensor).ds_shape) if is_partitioned(tensor) else tensor.shape


def whole_bytes(tensor: Held) -> int:
    """Return the bytes of the whole tensor."""
    return whole_shape(tensor).numel() * held(tensor).element_size()


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """Return a whole tensor, without a gradient; of one that the ranks share out, every rank calls this together."""
    if isinstance(tensor, DTensor):
        return cast(DTensor, tensor.detach()).full_tensor()
    if not is_partitioned(tensor):
        return tensor.detach()
    own = _ds(tensor).ds_tensor.detach().to(tensor.device)
    parts = own.new_empty(dist.get_world_size() * own.numel())
    dist.all_gather_single(parts, own.contiguous())
    return parts[: _ds(tensor).ds_numel].view(whole_shape(tensor))


def version_of(tensor: Tensor) -> int:
    """Return a number that rises when a weight is written to with torch's mark, as `mark_written` leaves it too."""
    return int((tensor.to_local() if isinstance(tensor, DTensor) else tensor)._version)


def mark_written(tensors: Iterable[Tensor]) -> None:
    """Raise the versions of weights whose pieces were written to, which their partitioned parameters do not see."""
    torch.autograd.graph.increment_version(list(tensors))


def _row_size(tensor: Tensor) -> int:
    return int(torch.Size(tensor.shape[1:]).numel())


def _ds(tensor: Tensor) -> Any:
    """Return a parameter with what DeepSpeed adds to it, of which no type is declared."""
    return cast(Any, tensor)
