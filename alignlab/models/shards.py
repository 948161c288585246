"""A model whose weights are spread over ranks by FSDP2: each rank holds some rows of each tensor.

Whoever computes with such a model does it through its root, which gathers a layer's weights for as long as they are
used: `PackedModel` finds the root by itself. Whole tensors are read through a `WeightView`.

    shard(model, mesh)            the model itself, from now on
    sharded_copy(model)           a frozen copy, of which no rank ever holds more than its rows
    whole_copy(model)             a frozen copy that each rank holds whole, such as to sample from

FSDP: Zhao et al. (2023), arXiv:2304.11277; after ZeRO stage 3: Rajbhandari et al. (2020), arXiv:1910.02054.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from alignlab.models.decoder import causal_lm
from alignlab.models.exact_weights import dtype_in_training, hold_in_float32, mark_exact
from alignlab.models.weight_view import view_of

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
_ROOT = "_alignlab_shard_root"


class ShardRoot(nn.Module):
    """Gathers the weights of a model around whatever is computed with it.

    Args:
        model: the model, or a PeftModel around it.
        mesh: of the ranks.

    Attributes:
        blueprint: the model before it was sharded, without weights.
    """

    blueprint: nn.Module

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.__dict__["blueprint"] = empty_copy(model)  # no part of this module
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        """Return what a function computes with the model; it takes no tensors, which FSDP would copy."""
        return function()


def shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Spread a model's weights over the ranks of a mesh, by rows; all roles must be on it, and no copies be needed.

    Weights in 16 bits that train are held in float32, see `exact_weights`. A model that is sharded already stays as it
    is. Every rank calls this together, with equal weights.

    Raises:
        ConfigError: see `exact_weights.dtype_in_training`.
    """
    lm = causal_lm(model)
    if _ROOT in lm.__dict__:
        return
    root = ShardRoot(model, mesh)
    dtype = dtype_in_training(model)
    # Inputs are not cast: they would be copied, and records of expert choices with them.
    precision = MixedPrecisionPolicy(dtype, dtype and torch.float32, cast_forward_inputs=False)
    for module in (*lm.get_decoder().layers, root):  # one after another: a layer in float32 is cut up at once
        if dtype is not None:
            hold_in_float32(parameter for parameter in module.parameters() if not isinstance(parameter, DTensor))
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=precision)
    if dtype is not None:
        mark_exact(root.parameters(), dtype)
    lm.__dict__[_ROOT] = root  # as a submodule it would hold the model that holds it


def shard_root(model: nn.Module) -> ShardRoot | None:
    """Return the root of a sharded model; None for one that is whole on each rank."""
    return cast("ShardRoot | None", causal_lm(model).__dict__.get(_ROOT))


def without_shards(model: nn.Module) -> nn.Module:
    """Return a sharded model as it was before, but without weights; any other model itself."""
    root = shard_root(model)
    return model if root is None else root.blueprint


def rows_of(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the rows of a tensor that this rank holds, sharing its memory, and the index of the first."""
    if not isinstance(tensor, DTensor):
        return tensor, 0
    # FSDP divides dimension 0 into equal parts, of which the last ones may be shorter, or empty.
    part = -(-tensor.shape[0] // tensor.device_mesh.size())
    return tensor.to_local(), min(part * tensor.device_mesh.get_local_rank(), tensor.shape[0])


def empty_copy(model: Module) -> Module:
    """Return a copy of a model without weights; buffers, which are small, are copied."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


@torch.no_grad()
def sharded_copy(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a sharded model, sharded alike. Every rank calls this together."""
    root = _root_of(model)
    twin = copy.deepcopy(root.blueprint).requires_grad_(False)
    shard(twin, root.mesh)
    device = _device_of(model)
    _root_of(twin)._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for copied, own in zip(twin.parameters(), model.parameters(), strict=True):
        rows_of(copied)[0].copy_(rows_of(own)[0])
    copy_buffers(model, twin)
    return twin.eval()


@torch.no_grad()
def whole_copy(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a sharded model that is whole on this rank. Every rank calls this together."""
    twin = copy.deepcopy(_root_of(model).blueprint).requires_grad_(False)
    device = _device_of(model)
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied weights stay one
    for module in twin.modules():
        for name, empty in module._parameters.items():
            if empty is not None:
                whole = nn.Parameter(torch.empty_like(empty, device=device), requires_grad=False)
                module._parameters[name] = made.setdefault(empty, whole)
    copy_whole(model, twin)
    return twin.eval()


@torch.no_grad()
def copy_whole(model: nn.Module, twin: nn.Module) -> None:
    """Copy the present weights of a sharded model into its `whole_copy`, one tensor at a time.

    Every rank calls this together.
    """
    weights = view_of(model)
    for name, copied in twin.named_parameters():
        copied.copy_(weights.whole(name))
    copy_buffers(model, twin)


def copy_buffers(model: nn.Module, twin: nn.Module) -> None:
    """Copy the buffers of a model, which each rank holds whole, into a copy of it."""
    for copied, own in zip(twin.buffers(), model.buffers(), strict=True):
        copied.copy_(own)


def _root_of(model: nn.Module) -> ShardRoot:
    root = shard_root(model)
    assert root is not None, "the model is whole on each rank"
    return root


def _device_of(model: nn.Module) -> torch.device:
    return next(rows_of(parameter)[0].device for parameter in model.parameters())
