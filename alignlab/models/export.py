"""A model's weights as its checkpoint holds them, in memory: names and layout of the Hub family."""

from __future__ import annotations

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

from alignlab.errors import ConfigError
from alignlab.models.adapters import merged_weights
from alignlab.models.attention import causal_lm
from alignlab.models.families import write_hub_config
from alignlab.models.transformer import PolicyForCausalLM

Model = PreTrainedModel | PeftModel
_ADAPTER_MARK = ".lora_"
_COPIES = (".modules_to_save.", ".original_module.")


def merged_tensors(model: Model) -> dict[str, Tensor]:
    """Every tensor of the model's checkpoint, an adapter merged into it.

    Tensors share the model's memory where nothing has to be merged or laid out anew. A tied head is left out.

    Raises:
        ConfigError: an adapter is more than a low-rank term on the weight of a linear layer.
    """
    return _tensors(model, {base.weight.data_ptr(): merged for base, merged in merged_weights(model).items()})


def base_tensors(model: Model) -> dict[str, Tensor]:
    """The same with the adapter left away."""
    return _tensors(model, {})


def adapter_tensors(model: PeftModel) -> dict[str, Tensor]:
    """The tensors of the adapter's own checkpoint, by PEFT's names."""
    tensors = get_peft_model_state_dict(model, adapter_name=model.active_adapter, save_embedding_layers=False)
    return cast(dict[str, Tensor], tensors)


def write_base(model: Model, folder: Path) -> None:
    """Write config and `base_tensors` as a checkpoint of the Hub family, or of our own type where there is none."""
    written = _written_as(causal_lm(model))
    config = written.config
    config.architectures = [type(written).__name__]
    config.dtype = causal_lm(model).dtype
    config.save_pretrained(folder)
    tensors = {name: tensor.detach().contiguous() for name, tensor in base_tensors(model).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _tensors(model: Model, replaced: Mapping[int, Tensor]) -> dict[str, Tensor]:
    """Tensors by name in the checkpoint; `replaced` holds others for some, by the address of their memory."""
    lm = causal_lm(model)
    names = [name for name in lm.state_dict() if any(mark in name for mark in _COPIES)]
    if names:
        raise ConfigError(
            f"the adapter trains whole modules (modules_to_save), such as {names[0]}, which cannot be exported; "
            "leave modules_to_save out of the adapter's config"
        )
    tensors = {
        name.replace(".base_layer.", "."): replaced.get(tensor.data_ptr(), tensor)
        for name, tensor in lm.state_dict().items()
        if _ADAPTER_MARK not in name and not name.endswith(".expert_load")
    }
    if lm.config.get_text_config().tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return cast(dict[str, Tensor], revert_weight_conversion(_written_as(lm), tensors))


def _written_as(lm: PreTrainedModel) -> PreTrainedModel:
    """What the checkpoint is of: the family's own class, without weights, or the model itself."""
    config = write_hub_config(lm.config) if isinstance(lm, PolicyForCausalLM) else None
    if config is None:
        return lm
    with no_init_weights(), init_empty_weights(include_buffers=False):
        return cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
