"""Folders of PEFT adapters: reading one, and putting it on the model that it was trained on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from alignlab.errors import CheckpointError
from alignlab.files.input_files import read_json_object
from alignlab.models.adapters import compute_in_base_dtype
from alignlab.models.hub.intact import check_folder, named_errors

_CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_DAMAGED = (
    OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, ArithmeticError,
    AssertionError, SafetensorError,
)  # fmt: skip


def is_adapter(path: str) -> bool:
    """Return True if a local folder holds a PEFT adapter."""
    return (Path(path) / _CONFIG).exists()


def adapter_config(path: str) -> Any:
    """Return the config of an adapter's folder.

    Raises:
        CheckpointError: it is damaged, or of a kind that PEFT does not know.
    """
    file = Path(path) / _CONFIG
    try:
        read_json_object(file, CheckpointError)
        return PeftConfig.from_pretrained(path)
    except _DAMAGED as error:
        raise CheckpointError(f"{file} cannot be read: {error}; copy the adapter again, or save it again") from error


def base_of(path: str) -> str:
    """Return the name of an adapter's base model.

    Raises:
        CheckpointError: its config names none, or an adapter, such as itself.
    """
    base = adapter_config(path).base_model_name_or_path
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{path} does not name its base model; set base_model_name_or_path in its {_CONFIG}")
    if is_adapter(base):
        itself = Path(base).resolve() == Path(path).resolve()
        raise CheckpointError(
            f"the base of the adapter {path} is {'the adapter itself' if itself else f'another adapter, {base}'}, and "
            f"must be a model; set base_model_name_or_path in its {_CONFIG} to the model that it was trained on"
            + ("" if itself else ", or merge that adapter first (alignlab merge)")
        )
    return base


def refuse_other_tasks(path: str) -> None:
    """Raise if an adapter was trained for another task than language modelling.

    Raises:
        CheckpointError: with the adapter's task.
    """
    task = adapter_config(path).task_type
    task = getattr(task, "value", task)
    if task == "SEQ_CLS":
        raise CheckpointError(
            f"{path} is a reward model, and a language model is needed here; give its base, or name it in rewards"
        )
    if task not in (None, "CAUSAL_LM"):
        raise CheckpointError(
            f"the adapter {path} has task_type {task}, and must have CAUSAL_LM; give an adapter of a language model"
        )


def check_tensors(path: str) -> None:
    """Raise if the tensors of an adapter's folder are missing, unreadable, or not finite.

    Raises:
        CheckpointError: with the file.
    """
    file, fix = Path(path) / TENSORS, "copy the adapter again, or save it again"
    if not file.is_file():
        raise CheckpointError(f"{path} has no {TENSORS}, in which an adapter is kept; {fix}")
    with named_errors(f"{file} is damaged", fix.capitalize()):
        tensors = load_file(file)
        finite = {name: t.is_floating_point() and bool(t.float().isfinite().all()) for name, t in tensors.items()}
    if not all(finite.values()) or not tensors:
        wrong = next((name for name in finite if not finite[name]), None)
        problem = "it holds no tensor" if wrong is None else f"{wrong} is no tensor of finite numbers"
        raise CheckpointError(f"{file} is no adapter: {problem}; {fix}")


def check_adapter_shapes(model: PeftModel, path: str) -> None:
    """Raise if the tensors of an adapter's folder have other names or shapes than the adapter on a model; none is read.

    Args:
        model: with the adapter that the folder's config describes; its weights may be missing.

    Raises:
        CheckpointError: naming the first of them.
    """
    file = Path(path) / TENSORS
    if not file.is_file() or model.peft_config[model.active_adapter].is_prompt_learning:
        return
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    expected = {name: list(tensor.shape) for name, tensor in state.items()}
    with named_errors(f"{file} is damaged", "Copy the adapter again, or save it again"), safe_open(file, "pt") as held:
        shapes = {name: held.get_slice(name).get_shape() for name in held.keys()}  # noqa: SIM118  not a mapping
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            stored = "missing" if name not in shapes else f"of shape {shapes[name]}"
            raise CheckpointError(
                f"{name} must have the shape {shape} by {Path(path) / _CONFIG} and the base model, and is {stored} in "
                f"{file}; give the model that the adapter was trained on, or copy the adapter again"
            )


def with_empty_adapter(base: PreTrainedModel, path: str) -> PeftModel:
    """Return a model without weights under the adapter of a folder, of which the shapes alone are read.

    Raises:
        CheckpointError: the adapter's shapes do not fit its config and the base, or see `refuse_other_tasks`.
    """
    refuse_other_tasks(path)
    check_tensors(path)
    with named_errors(f"the adapter {path} does not fit {base.config.name_or_path}", "Copy the adapter again"):
        model = get_peft_model(base, adapter_config(path))
    assert isinstance(model, PeftModel)
    check_adapter_shapes(model, path)
    return compute_in_base_dtype(model)


def with_saved_adapter(base: PreTrainedModel, path: str) -> PeftModel:
    """Return a model with the adapter of a folder on it, in evaluation mode; every tensor is present, finite and used.

    Raises:
        CheckpointError: the adapter is damaged, of another base, or of another task.
    """
    check_folder(path)
    refuse_other_tasks(path)
    check_tensors(path)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            model = PeftModel.from_pretrained(base, path)
            if not model.peft_config[model.active_adapter].is_prompt_learning:
                result: Any = set_peft_model_state_dict(
                    model, load_peft_weights(path, device=str(model.device)), adapter_name=model.active_adapter
                )
                if result.unexpected_keys:
                    raise ValueError(f"{result.unexpected_keys[0]} is in the file, and in no layer of the model")
    except (*_DAMAGED, UserWarning) as error:
        raise CheckpointError(
            f"the adapter {path} does not fit {base.config.name_or_path or type(base).__name__}: {_brief(error)}; give "
            "the model that it was trained on, or another adapter; if it is this one, the adapter's folder is damaged"
        ) from error
    return compute_in_base_dtype(model).eval()


def _brief(error: BaseException) -> str:
    """Return the first lines of an error, because PEFT's errors list every tensor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    return text if len(text) <= 400 else f"{text[:400]} ..."
