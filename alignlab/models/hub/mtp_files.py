"""The layer for multi-token prediction in files of DeepSeek-V3, which hold it behind the N layers of the decoder.

    in the files                                    here
    model.layers.N.{enorm,hnorm,eh_proj}            mtp.{enorm,hnorm,eh_proj}
    model.layers.N.shared_head.norm                 mtp.post_norm
    model.layers.N.{input_layernorm,self_attn,...}  mtp.mtp_block.{input_layernorm,self_attn,...}
    model.layers.N.{embed_tokens,shared_head.head}  copies of the embeddings and the head, which the layer shares
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from alignlab.errors import CheckpointError
from alignlab.models.config import PolicyConfig
from alignlab.models.hub.weight_files import Piece, WeightFiles
from alignlab.models.mtp import MultiTokenPrediction
from alignlab.models.transformer import PolicyForCausalLM

FAMILY = "deepseek_v3"
"""The family whose files hold such a layer."""
_PARTS = (("mtp_block.", ""), ("post_norm.", "shared_head.norm."))
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


def file_name(name: str, config: PolicyConfig) -> str:
    """Return the name of a tensor of ours in the family's files, where the layer is behind those of the decoder."""
    inner = name.removeprefix("mtp.")
    if inner == name:
        return name
    for ours, theirs in _PARTS:
        if inner.startswith(ours):
            inner = f"{theirs}{inner.removeprefix(ours)}"
            break
    return f"model.layers.{config.num_hidden_layers}.{inner}"


def is_of_family(config: PolicyConfig) -> bool:
    """Return whether a model comes from the family's files."""
    return (config.hub_config or {}).get("model_type") == FAMILY


def is_behind_layers(name: str, num_layers: int) -> bool:
    """Return whether a tensor of the family's files is of a layer for multi-token prediction."""
    match = _LAYER.match(name)
    return match is not None and int(match[1]) >= num_layers


def copies(config: PolicyConfig) -> dict[str, str]:
    """Return the tensors that the layer shares with the model, by the names of their copies in the files."""
    prefix = f"model.layers.{config.num_hidden_layers}"
    return {
        f"{prefix}.embed_tokens.weight": "model.embed_tokens.weight",
        f"{prefix}.shared_head.head.weight": "lm_head.weight",
    }


def check_copies(files: WeightFiles, config: PolicyConfig) -> None:
    """Raise a CheckpointError if the layer's embeddings or head are others than the model's."""
    for copy, name in copies(config).items():
        if copy not in files.shapes or name not in files.shapes:
            continue
        if not torch.equal(*(files.mapped((Piece(each),)) for each in (copy, name))):
            raise CheckpointError(
                f"{copy} must be a copy of {name}, which the layer for multi-token prediction shares here, and it "
                "differs; load the model without that layer (model.mtp: false)"
            )


def refuse_mtp(mtp: bool, reason: str) -> None:
    """Raise a CheckpointError if a layer for multi-token prediction is asked for, where there can be none."""
    if mtp:
        raise CheckpointError(f"model.mtp is true, and {reason}; use false, or a checkpoint of {FAMILY}")


def add_layer(model: PreTrainedModel, path: str) -> None:
    """Give a model the layer that its files hold, without weights; one that has it already stays as it is.

    Its loss trains the layer alone (`mtp_detach`), so that a training of the policy is not changed by it.

    Args:
        path: a folder, or the name of a model on the Hub, whose config alone is looked at.

    Raises:
        CheckpointError: the family's files have no such layer, this model's have none, or several.
    """
    if not isinstance(model, PolicyForCausalLM):
        return refuse_mtp(True, f"{path} is a {type(model).__name__}, which is none of our models")
    config = model.config
    if config.num_mtp_layers:
        return
    given: dict[str, Any] = config.hub_config or {}
    count = given.get("num_nextn_predict_layers", given.get("num_mtp_layers", 1))
    eh_proj = file_name("mtp.eh_proj.weight", config)
    is_missing = Path(path).is_dir() and eh_proj not in WeightFiles(Path(path)).shapes
    if not is_of_family(config) or count != 1 or is_missing:
        raise CheckpointError(
            f"model.mtp is true, and {path} must be of {FAMILY}, with num_nextn_predict_layers 1 and a layer for "
            f"multi-token prediction in its files ({eh_proj}); use false"
        )
    config.num_mtp_layers, config.mtp_mlp_layer_type, config.mtp_detach = 1, "sparse", True
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model.mtp = MultiTokenPrediction(config)


def written_tensors(config: PolicyConfig, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a model with such a layer under the names of the family's files, the copies among them."""
    owners = copies(config)
    for name, tensor in tensors:
        yield file_name(name, config), tensor
        yield from ((copy, tensor) for copy, owner in owners.items() if owner == name)
