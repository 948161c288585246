"""A model's weights in memory, under the names and in the layout of its Hub checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from alignlab.files.library_errors import writing
from alignlab.files.tensor_files import write_streamed
from alignlab.models.adapters import adapter_state
from alignlab.models.decoder import causal_lm
from alignlab.models.hub.families import write_hub_config
from alignlab.models.hub.mtp_files import FAMILY, written_tensors
from alignlab.models.merging import base_parts, merged_parts, untie_config, unties
from alignlab.models.router_state import is_router_state
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.weight_view import WeightView, shapes_of, view_of

Model = PreTrainedModel | PeftModel


def merged_tensors(model: Model, weights: WeightView | None = None) -> dict[str, Tensor]:
    """Return every tensor of the model's checkpoint, an adapter merged into it.

    Tensors share the model's memory where nothing has to be merged or laid out anew. A head that is tied, and stays so,
    is left out.

    Args:
        weights: view of `model`; default: `view_of` it.

    Raises:
        ConfigError: an adapter cannot be merged into weights of the base's names and shapes.
    """
    return dict(streamed_tensors(model, weights))


def streamed_tensors(model: Model, weights: WeightView | None = None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of `merged_tensors`, made as they are asked for: at one time, a decoder layer's are held.

    Raises:
        ConfigError: see `merged_tensors`.
    """
    yield from _named_as_written(model, merged_parts(model, weights))


def checkpoint_shapes(model: Model, weights: WeightView | None = None) -> dict[str, Tensor]:
    """Return `merged_tensors` without numbers, on the device "meta"; no other rank is asked.

    Args:
        weights: view of `model`; default: `view_of` it.
    """
    # An adapter is merged into weights of the base's names and shapes.
    return dict(_named_as_written(model, base_parts(model, shapes_of(weights or view_of(model)))))


def base_tensors(model: Model, weights: WeightView | None = None) -> dict[str, Tensor]:
    """Return what `merged_tensors` returns for the model without its adapter."""
    return dict(_named_as_written(model, base_parts(model, weights)))


def adapter_tensors(
    model: PeftModel, name: str | None = None, weights: WeightView | None = None
) -> dict[str, Tensor]:
    """Return the tensors of an adapter's checkpoint, by PEFT's names.

    Args:
        name: of the adapter; default: the active one.
        weights: view of `model`; default: `view_of` it.
    """
    name, state = name or model.active_adapter, adapter_state(model, weights)
    tensors = get_peft_model_state_dict(model, state, adapter_name=name, save_embedding_layers=False)
    return cast(dict[str, Tensor], tensors)


def write_base(model: Model, folder: Path, weights: WeightView | None = None) -> None:
    """Write config and `base_tensors` as a checkpoint of the Hub family, or of our own type where there is none."""
    written = _written_as(causal_lm(model))
    config = copy.deepcopy(written.config)
    if unties(model):  # an update will bring a head of its own
        untie_config(config)
    config.architectures = [type(written).__name__]
    config.dtype = causal_lm(model).dtype
    with writing(folder, "the model for vLLM"):
        config.save_pretrained(folder)
        write_streamed(
            _named_as_written(model, base_parts(model, weights)), checkpoint_shapes(model, weights),
            folder / "model.safetensors", metadata={"format": "pt"},
        )


def _named_as_written(model: Model, parts: Iterable[Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a state without adapters, which comes in parts, by the names of the checkpoint."""
    lm = causal_lm(model)
    written = _written_as(lm)
    is_tied = lm.config.get_text_config().tie_word_embeddings and not unties(model)
    config: Any = lm.config
    holds_mtp = written.config.model_type == FAMILY and lm is not written and config.num_mtp_layers > 0
    for part in parts:
        items = written_tensors(config, part.items()) if holds_mtp else part.items()
        tensors = {
            name: tensor for name, tensor in items
            if not is_router_state(name) and not (is_tied and name == "lm_head.weight")
        }
        yield from cast(dict[str, Tensor], revert_weight_conversion(written, tensors)).items()


def _written_as(lm: PreTrainedModel) -> PreTrainedModel:
    """Return an empty model of the Hub family's class, or the model itself if there is no family."""
    config = write_hub_config(lm.config) if isinstance(lm, PolicyForCausalLM) else None
    if config is None:
        return lm
    with no_init_weights(), init_empty_weights(include_buffers=False):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
