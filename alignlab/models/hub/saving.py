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

from alignlab.errors import AlignlabError, CheckpointError
from alignlab.files.atomic_files import TEMPORARY, hidden_name, make_folder, publish_folder, recover_folder, sync_folder
from alignlab.files.library_errors import writing
from alignlab.files.manifest import write_manifest
from alignlab.models.adapters import adapter_state
from alignlab.models.decoder import causal_lm
from alignlab.models.weight_view import WeightView

SAVING_ERRORS = (
    OSError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, ImportError,
    SafetensorError, StrictDataclassError,
)  # fmt: skip
"""What `transformers`, PEFT, safetensors and JSON raise where something cannot be written."""


@contextmanager
def published(folder: str | Path, *, run_id: str | None = None) -> Iterator[Path]:
    """Yield a hidden folder to write a model and its tokenizer to, and then publish it under its name.

    The files get a manifest, are synced to the disk and replace an earlier folder in one step. If anything fails before
    that, or the process is killed, the earlier folder stays as it was.

    Args:
        folder: the published name.
        run_id: of the run that made the model; None where none did.

    Raises:
        DiskError: the disk, a limit or a permission.
    """
    folder = Path(folder).absolute()
    if folder.is_symlink():  # the link stays, and what it leads to is replaced
        folder = folder.resolve()
    with writing(folder, "the model"):
        yield from _published(folder, run_id)


def _published(folder: Path, run_id: str | None) -> Iterator[Path]:
    if _holds_nothing(folder) and (folder.is_mount() or not os.access(folder.parent, os.W_OK | os.X_OK)):
        yield folder  # an empty folder that cannot be replaced, such as a mount, is filled in place
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
    """Write what `model.save_pretrained` writes except the weights, and try the conversion of those.

    Raises:
        CheckpointError, DiskError: see `saving`.
    """
    with saving(type(model).__name__, folder):
        model.save_pretrained(folder, state_dict={})
        tensors = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
        revert_weight_conversion(model, {name: tensor.to("meta") for name, tensor in tensors.items()})


def save_adapter(model: PeftModel, folder: str | Path, weights: WeightView | None = None) -> None:
    """Write the active adapter and its config, as PEFT does.

    Args:
        weights: view of `model`; default: `view_of` it.
    """
    name = model.active_adapter
    state = adapter_state(model, weights)
    # Embeddings are never resized; PEFT's check for that would load the base's config by the wrong class.
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False, selected_adapters=[name])
    inner = Path(folder) / name
    if inner.is_dir():  # PEFT writes an adapter that is not called "default" there
        for path in inner.iterdir():
            path.replace(Path(folder) / path.name)
        inner.rmdir()


def save_adapter_without_weights(model: PeftModel, folder: str | Path) -> None:
    """Write the files of the active adapter except its weights, and collect those as saving does.

    Raises:
        CheckpointError, DiskError: see `saving`.
    """
    name = model.active_adapter
    config: Any = copy.deepcopy(model.peft_config[name])
    config.base_model_name_or_path = config.base_model_name_or_path or causal_lm(model).config.name_or_path
    with saving(f"the adapter {name}", folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        model.create_or_update_model_card(str(folder))
        get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        config.save_pretrained(str(folder))


@contextmanager
def saving(name: str, folder: str | Path) -> Iterator[None]:
    """Raise a named error for a model or adapter that cannot be saved within this context.

    Args:
        name: of the model or adapter, for the message.
        folder: where it is written.

    Raises:
        DiskError: the disk has no room, or a permission or a limit is in the way.
        CheckpointError: the model itself cannot be saved.
    """
    try:
        with writing(folder, "what the end of the run saves"):
            yield
    except AlignlabError:
        raise
    except SAVING_ERRORS as error:
        raise unsaveable(name, error) from error


def unsaveable(name: str, error: Exception) -> CheckpointError:
    """Return the error of a model or adapter that cannot be saved."""
    reason = f"{type(error).__name__}: {error}".strip()
    return CheckpointError(
        f"{name} cannot be saved, and the end of the run saves it: {reason}\nCorrect its config or its tensors before "
        "training"
    )
