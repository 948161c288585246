"""Loading of our models tensor by tensor, straight onto their device: the host never holds a second copy."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from alignlab.models.hub.weight_files import Piece, WeightFiles, plan_of
from alignlab.models.router_state import is_router_state
from alignlab.models.transformer import PolicyForCausalLM


def fill(model: PolicyForCausalLM, folder: Path, *, dtype: torch.dtype, device: torch.device) -> bool:
    """Give a model without weights those of a folder.

    On a CPU, a weight that has the dtype already stays in the file, mapped into memory, and is read when it is used.

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
    tied = _tied(model)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    optional = {name for name in wanted if is_router_state(name) and name not in files.shapes}
    plan = plan_of(files, {name: tensor.shape for name, tensor in wanted.items() if name not in optional})
    if plan is None:
        return False
    for name, pieces in plan.items():
        _put(model, name, _tensor(files, pieces, wanted[name], dtype, device))
    for name, buffer in model.named_buffers():
        if name not in plan:
            _put(model, name, buffer.to(device))
    model.tie_weights()
    return True


def _tied(model: PolicyForCausalLM) -> set[str]:
    """Return the names of parameters that are another one's tensor."""
    return set(PolicyForCausalLM._tied_weights_keys) if model.config.tie_word_embeddings else set()


def _tensor(
    files: WeightFiles, pieces: tuple[Piece, ...], empty: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the values of a parameter, or of a buffer, which keeps its dtype and is the one that has values."""
    dtype = dtype if empty.is_meta else empty.dtype
    if device.type == "cpu":
        mapped = files.mapped(pieces, dtype)
        if mapped is not None:
            return mapped
    values = torch.empty(empty.shape, dtype=dtype, device=device)
    files.read(pieces, values)
    return values


def _put(model: nn.Module, name: str, values: Tensor) -> None:
    """Replace a parameter or buffer of a model."""
    path, _, own = name.rpartition(".")
    owner = model.get_submodule(path)
    if own in owner._buffers:
        owner._buffers[own] = values
    else:
        owner._parameters[own] = nn.Parameter(values, requires_grad=owner.get_parameter(own).requires_grad)
