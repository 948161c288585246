"""A model's weights as its checkpoint holds them, in memory: names and layout of the Hub family."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.initialization import no_init_weights

from alignlab.library_errors import writing
from alignlab.models.attention import causal_lm
from alignlab.models.families import write_hub_config
from alignlab.models.merging import base_state, merged_state, untie_config, unties
from alignlab.models.transformer import PolicyForCausalLM

Model = PreTrainedModel | PeftModel


def merged_tensors(model: Model) -> dict[str, Tensor]:
    """Every tensor of the model's checkpoint, an adapter merged into it.

    Tensors share the model's memory where nothing has to be merged or laid out anew. A head that is tied, and stays so,
    is left out.

    Raises:
        ConfigError: an adapter cannot be merged into weights of the base's names and shapes.
    """
    return _tensors(model, merged_state(model))


def base_tensors(model: Model) -> dict[str, Tensor]:
    """The same with the adapter left away."""
    return _tensors(model, base_state(model))


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The tensors of the adapter's own checkpoint, by PEFT's names."""
    tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    return cast(dict[str, Tensor], tensors)


def write_base(model: Model, folder: Path) -> None:
    """Write config and `base_tensors` as a checkpoint of the Hub family, or of our own type where there is none."""
    written = _written_as(causal_lm(model))
    config = copy.deepcopy(written.config)
    if unties(model):  # an update will bring a head of its own
        untie_config(config)
    config.architectures = [type(written).__name__]
    config.dtype = causal_lm(model).dtype
    tensors: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in base_tensors(model).items():
        shared = tensor.data_ptr() in seen  # an untied head is the embeddings until then; safetensors takes none twice
        tensors[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
        seen.add(tensor.data_ptr())
    with writing(folder, "the model for vLLM"):
        config.save_pretrained(folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(model: Model, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state without adapters, by the names that the checkpoint has for it."""
    lm = causal_lm(model)
    tensors = {name: tensor for name, tensor in state.items() if not name.endswith(".expert_load")}
    if lm.config.get_text_config().tie_word_embeddings and not unties(model):
        tensors.pop("lm_head.weight", None)
    return cast(dict[str, Tensor], revert_weight_conversion(_written_as(lm), tensors))


def _written_as(lm: PreTrainedModel) -> PreTrainedModel:
    """What the checkpoint is of: the family's own class, without weights, or the model itself."""
    config = write_hub_config(lm.config) if isinstance(lm, PolicyForCausalLM) else None
    if config is None:
        return lm
    with no_init_weights(), init_empty_weights(include_buffers=False):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
