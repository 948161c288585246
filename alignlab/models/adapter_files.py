"""Adapters as PEFT's folders hold them: reading one, and putting it on the model that it was trained on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from alignlab.config.input_limits import read_json_object
from alignlab.errors import CheckpointError
from alignlab.models.adapters import compute_in_base_dtype
from alignlab.models.intact import check_folder, named_errors

_CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
_DAMAGED = (
    OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, ImportError, ArithmeticError,
    AssertionError, SafetensorError,
)  # fmt: skip


def is_adapter(path: str) -> bool:
    """Whether a local folder holds an adapter of PEFT's."""
    return (Path(path) / _CONFIG).exists()


def adapter_config(path: str) -> Any:
    """The config of an adapter's folder.

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
    """The checkpoint that an adapter belongs on.

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
    """Raise if an adapter makes something else than a language model.

    Raises:
        CheckpointError: with its task, and where it belongs.
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
    """Raise if the tensors of an adapter's folder cannot be read, are none, or are no finite numbers.

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


def with_saved_adapter(base: PreTrainedModel, path: str) -> PeftModel:
    """A model with the adapter of a folder on it, every tensor of which is there, finite and used; in evaluation mode.

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
    """The first lines of an error: PEFT's name every tensor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2])
    return text if len(text) <= 400 else f"{text[:400]} ..."
