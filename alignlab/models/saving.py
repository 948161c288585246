"""Saving adapters, publishing saved folders whole, and saving any model without its weights, as before a training."""

from __future__ import annotations

import copy
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from alignlab.atomic_files import TEMPORARY, hidden_name, make_folder, publish_folder, recover_folder, sync_folder
from alignlab.errors import CheckpointError
from alignlab.library_errors import writing
from alignlab.manifest import write_manifest
from alignlab.models.attention import causal_lm

SAVING_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What `transformers`, PEFT, safetensors and JSON raise where something cannot be written."""


@contextmanager
def published(folder: str | Path, *, run_id: str | None = None) -> Iterator[Path]:
    """Give a hidden folder to write a model and its tokenizer to, which is then published under its name, whole.

    What was written gets a manifest, is synced to the disk and takes the place of an earlier folder, which stays as it
    was if anything fails until then, or if the process is killed.

    Args:
        folder: its name.
        run_id: of the run that made the model; None where none did.

    Raises:
        DiskError: the disk, a limit or a permission.
    """
    folder = Path(folder).absolute()
    with writing(folder, "the model"):
        yield from _published(folder, run_id)


def _published(folder: Path, run_id: str | None) -> Iterator[Path]:
    if _holds_nothing(folder) and (folder.is_mount() or not os.access(folder.parent, os.W_OK | os.X_OK)):
        yield folder  # nothing can be put in its place, and nothing is lost in it
        write_manifest(folder, run_id=run_id)
        sync_folder(folder)
        return
    temporary = hidden_name(folder, TEMPORARY)
    recover_folder(folder)
    make_folder(folder.parent)
    temporary.mkdir()
    try:
        yield temporary
        write_manifest(temporary, run_id=run_id)
        publish_folder(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _holds_nothing(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


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
