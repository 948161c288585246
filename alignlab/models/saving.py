"""Saving adapters, and saving any model without its weights, which shows before a training what its end cannot save."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from alignlab.errors import CheckpointError
from alignlab.models.attention import causal_lm

SAVING_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What `transformers`, PEFT, safetensors and JSON raise where something cannot be written."""


def save_without_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Write all that `model.save_pretrained` writes but the weights, and try what it does with those.

    Raises:
        CheckpointError: the model cannot be saved.
    """
    try:
        model.save_pretrained(folder, state_dict={})
        tensors = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
        revert_weight_conversion(model, {name: tensor.to("meta") for name, tensor in tensors.items()})
    except SAVING_ERRORS as error:
        raise unsaveable(type(model).__name__, error) from error


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write the adapter in use and its config, as PEFT does."""
    # Embeddings are never resized here, and PEFT's own look for that would read the base's config as another class.
    name = model.active_adapter
    model.save_pretrained(str(folder), save_embedding_layers=False, selected_adapters=[name])
    inner = Path(folder) / name
    if inner.is_dir():  # PEFT's place for an adapter that is not called default
        for path in inner.iterdir():
            path.replace(Path(folder) / path.name)
        inner.rmdir()


def save_adapter_without_weights(model: PeftModel, folder: str | Path) -> None:
    """Write all of the adapter in use but its weights, and collect those as saving does.

    Raises:
        CheckpointError: the adapter cannot be saved.
    """
    name = model.active_adapter
    config: Any = copy.deepcopy(model.peft_config[name])
    config.base_model_name_or_path = config.base_model_name_or_path or causal_lm(model).config.name_or_path
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        model.create_or_update_model_card(str(folder))
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        config.save_pretrained(str(folder))
    except SAVING_ERRORS as error:
        raise unsaveable(f"the adapter {name}", error) from error


def unsaveable(what: str, error: Exception) -> CheckpointError:
    """Return the error of something that cannot be written."""
    reason = f"{type(error).__name__}: {error}".strip()
    return CheckpointError(
        f"{what} cannot be saved, and the end of the run saves it: {reason}\nCorrect its config or its tensors before "
        "training"
    )
