"""Loading of our models tensor by tensor, straight onto their device: the host never holds a second copy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from alignlab.models.config import PolicyConfig
from alignlab.models.hub.host_copies import is_shared, shared_copies
from alignlab.models.hub.mtp_files import check_copies, copies, file_name, is_behind_layers, is_of_family
from alignlab.models.hub.weight_files import Piece, WeightFiles, plan_of
from alignlab.models.router_state import is_router_state
from alignlab.models.transformer import PolicyForCausalLM

_log = logging.getLogger(__name__)


def fill(model: PolicyForCausalLM, folder: Path, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Give a model without weights those of a folder.

    On a CPU, a weight that has the dtype already stays in the file, mapped into memory, and is read when it is used;
    others are made once for all ranks of the host within `host_copies.made_once`.

    Args:
        model: on the meta device, its buffers aside.
        folder: of a checkpoint.
        dtype: of the parameters; buffers keep theirs.

    Returns:
        False if the folder's tensors are not exactly the model's, under names that are known here; nothing is read.
    """
    try:
        files = WeightFiles(folder)
    except (SafetensorError, OSError, ValueError, KeyError):  # what is wrong is said by the other way of loading
        return False
    to_read = _tensors_to_read(model, files)
    plan = _plan(files, to_read, model.config)
    if plan is None:
        return False
    if is_of_family(model.config):
        _check_mtp(files, plan, model.config, folder)
    # Parameters are on the meta device, and get the dtype; buffers have values, and keep theirs.
    empty = {
        name: torch.empty(tensor.shape, dtype=dtype if tensor.is_meta else tensor.dtype, device="meta")
        for name, tensor in to_read.items()
    }
    for name, values in _values(files, plan, empty, device):
        _put(model, name, values)
    for name, buffer in model.named_buffers():
        if name not in plan:
            _put(model, name, buffer.to(device))
    model.tie_weights()
    return True


def _tensors_to_read(model: PolicyForCausalLM, files: WeightFiles) -> dict[str, Tensor]:
    """Return the parameters and buffers to be read: tied ones once, and states of routers where the files have them.
    """
    tied = set(PolicyForCausalLM._tied_weights_keys) if model.config.tie_word_embeddings else set()
    return {
        name: tensor for name, tensor in model.state_dict().items()
        if name not in tied and (name in files.shapes or not is_router_state(name))
    }


def _plan(
    files: WeightFiles, to_read: Mapping[str, Tensor], config: PolicyConfig
) -> dict[str, tuple[Piece, ...]] | None:
    """Return the pieces of the files that each tensor of the model is made of; None if the files do not fit it."""
    names = {name: file_name(name, config) if is_of_family(config) else name for name in to_read}
    shapes = {names[name]: tensor.shape for name, tensor in to_read.items()}
    pieces = plan_of(files, shapes, may_remain=_unread(config))
    return None if pieces is None else {name: pieces[names[name]] for name in to_read}


def _check_mtp(
    files: WeightFiles, plan: Mapping[str, tuple[Piece, ...]], config: PolicyConfig, folder: Path
) -> None:
    """Check the copies that a layer for multi-token prediction has in the files, or warn that the layer is left out.

    Raises:
        CheckpointError: see `check_copies`.
    """
    if config.num_mtp_layers:
        check_copies(files, config)
    elif files.shapes.keys() - {piece.name for pieces in plan.values() for piece in pieces}:
        _log.warning(
            "the layer for multi-token prediction in %s is left out, as model.mtp says, and will not be written back",
            folder,
        )


def _unread(config: PolicyConfig) -> Callable[[str], bool]:
    """Return which tensors of the files are not read: a layer for multi-token prediction, or its copies alone."""
    if not is_of_family(config):
        return lambda _: False
    if config.num_mtp_layers:
        return copies(config).__contains__
    return lambda name: is_behind_layers(name, config.num_hidden_layers)


def _values(
    files: WeightFiles, plan: Mapping[str, tuple[Piece, ...]], empty: Mapping[str, Tensor], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of parameters and buffers: mapped, made once for a host, or made for this process.

    Args:
        empty: their shapes and dtypes.
    """
    not_mapped = {}
    for name, shape in empty.items():
        if device.type == "cpu" and files.can_map(plan[name], shape.dtype):
            yield name, files.mapped(plan[name])
        else:
            not_mapped[name] = shape
    values = _read_values(files, plan, not_mapped, device)
    yield from shared_copies(not_mapped, values).items() if not_mapped and is_shared() else values


def _read_values(
    files: WeightFiles, plan: Mapping[str, tuple[Piece, ...]], empty: Mapping[str, Tensor], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of parameters and buffers that are read from the files, one after another.

    Args:
        empty: their shapes and dtypes.
    """
    for name, shape in empty.items():
        values = torch.empty_like(shape, device=device)
        files.read(plan[name], values)
        yield name, values


def _put(model: nn.Module, name: str, values: Tensor) -> None:
    """Replace a parameter or buffer of a model."""
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    if own in owner._buffers:
        owner._buffers[own] = values
    else:
        owner._parameters[own] = nn.Parameter(values, requires_grad=owner.get_parameter(own).requires_grad)
