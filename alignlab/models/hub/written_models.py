"""Models as they are written: copies over the same tensors, of the class that a checkpoint names."""

from __future__ import annotations

from typing import Any, cast

from accelerate import init_empty_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from alignlab.models.hub.mtp_files import FAMILY, copies, file_name
from alignlab.models.router_state import is_router_state
from alignlab.models.shards import without_shards
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.weight_view import WeightView, whole_module, whole_tensors


def as_own_class(model: PreTrainedModel, view: WeightView) -> PreTrainedModel:
    """Return a copy of the model that holds whole tensors, with tied ones tied again."""
    twin: Any = whole_module(without_shards(model), view)
    twin.tie_weights()
    return cast(PreTrainedModel, twin)


def as_family(model: PreTrainedModel, config: PreTrainedConfig, view: WeightView) -> PreTrainedModel:
    """Return a model of the Hub family's class over the same tensors, without a layer for multi-token prediction."""
    config.dtype = model.dtype
    with no_init_weights(), init_empty_weights(include_buffers=False):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    names = (name for name in view.names() if not is_router_state(name) and not name.startswith("mtp."))
    twin.load_state_dict(dict(whole_tensors(view, names)), assign=True)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    return twin


def with_mtp_layer(model: PreTrainedModel, written: PreTrainedModel, view: WeightView) -> dict[str, Tensor] | None:
    """Return the state to write where a family's class has no layer for multi-token prediction, and our model has one.

    Args:
        written: holds the decoder's tensors.
        view: of our weights.

    Returns:
        None where the state is that of `written`.
    """
    holds_layer = isinstance(model, PolicyForCausalLM) and model.config.num_mtp_layers > 0
    if not holds_layer or written.config.model_type != FAMILY:
        return None
    config, state = cast(PolicyForCausalLM, model).config, dict(written.state_dict())
    # Clones, because of two names of one tensor the second would be left out.
    state |= {copied: state[name].detach().clone() for copied, name in copies(config).items()}
    names = [name for name in view.names() if name.startswith("mtp.") and not is_router_state(name)]
    return state | {file_name(name, config): tensor for name, tensor in whole_tensors(view, names)}
