"""Models whose weights, or the optimizer's state of which, are spread over ranks.

Whoever computes with such a model does it through its root, which gathers a layer's weights for as long as they are
used: `PackedModel` finds the root by itself. Whole tensors are read through a `WeightView`.

    shard(model, mesh)            the model itself, from now on, by FSDP2: each rank holds some rows of each tensor
    sharded_copy(model)           a frozen copy, of which no rank ever holds more than its rows
    whole_copy(model)             a frozen copy that each rank holds whole, such as to sample from

FSDP: Zhao et al. (2023), arXiv:2304.11277; after ZeRO stage 3: Rajbhandari et al. (2020), arXiv:1910.02054.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from alignlab.models.decoder import causal_lm
from alignlab.models.exact_weights import dtype_in_training, hold_in_float32, mark_exact
from alignlab.models.pieces import held, rows_of
from alignlab.models.weight_view import view_of

T = TypeVar("T")
Module = TypeVar("Module", bound=nn.Module)
_ROOT = "_alignlab_shard_root"


class Root(Protocol):
    """The context within which a model is computed whose training is spread over ranks.

    Attributes:
        mesh: of the ranks.
        blueprint: the model before it was sharded, without weights.
        spreads_weights: whether each rank holds a part of the weights alone, or the optimizer's state alone is spread.
    """

    mesh: DeviceMesh
    blueprint: nn.Module
    spreads_weights: bool

    def __call__(self, function: Callable[[], Any]) -> Any:
        """Return what a function computes with the model, whose weights are gathered around it."""
        ...


class ShardRoot(nn.Module):
    """The root of a model that FSDP2 spreads; a `Root`.

    Args:
        model: the model, or a PeftModel around it.
        mesh: of the ranks.
    """

    blueprint: nn.Module
    spreads_weights = True

    def __init__(self, model: nn.Module, mesh: DeviceMesh) -> None:
        super().__init__()
        self.mesh = mesh
        self.__dict__["blueprint"] = empty_copy(model)  # no part of this module
        self.model = model

    def __call__(self, function: Callable[[], T]) -> T:
        """Return what a function computes with the model; it takes no tensors, which FSDP would copy.

        Between a forward and its backward pass the embedding and the head stay gathered.
        """
        try:
            result: T = super().__call__(function)
        finally:
            if not torch.is_grad_enabled():  # no backward pass will free them, and the next update would not reach them
                self.release()
        return result

    def forward(self, function: Callable[[], T]) -> T:
        """Return what a function computes."""
        return function()

    def release(self) -> None:
        """Keep of the embedding and the head this rank's rows alone."""
        cast(FSDPModule, self).reshard()


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
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not root, mp_policy=precision)
    if dtype is not None:
        mark_exact(root.parameters(), dtype)
    set_root(model, root)


def set_root(model: nn.Module, root: Root) -> None:
    """Make `root` what a model is computed within."""
    causal_lm(model).__dict__[_ROOT] = root  # as a submodule it would hold the model that holds it


def shard_root(model: nn.Module) -> Root | None:
    """Return the root of a model whose training is spread; None for one that each rank trains by itself."""
    return cast("Root | None", causal_lm(model).__dict__.get(_ROOT))


def is_spread(model: nn.Module) -> bool:
    """Return whether each rank holds a part of a model's weights alone."""
    root = shard_root(model)
    return root is not None and root.spreads_weights


def without_shards(model: nn.Module) -> nn.Module:
    """Return a sharded model as it was before, but without weights; any other model itself."""
    root = shard_root(model)
    return model if root is None else root.blueprint


def empty_copy(model: Module) -> Module:
    """Return a copy of a model without weights; buffers, which are small, are copied."""
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, memo)


@torch.no_grad()
def sharded_copy(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a model whose weights are spread, spread by FSDP2. Every rank calls this together."""
    root = _root_of(model)
    twin = copy.deepcopy(root.blueprint).requires_grad_(False)
    shard(twin, root.mesh)
    device = _device_of(model)
    cast(ShardRoot, _root_of(twin))._apply(
        lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )
    weights = view_of(model)
    for name, copied in twin.named_parameters():
        rows, first = rows_of(copied)
        rows.copy_(weights.whole(name)[first : first + len(rows)])
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


def _root_of(model: nn.Module) -> Root:
    root = shard_root(model)
    assert root is not None, "the model is trained by each rank for itself"
    return root


def _device_of(model: nn.Module) -> torch.device:
    return next(held(parameter).device for parameter in model.parameters())
