"""Models from checkpoints and back: Hub families unchanged in both directions, our own shapes, adapters.

`transformers` reads and writes every Hub checkpoint, with its conversions of names: in memory, its weights of the
families in `families.py` have our names, and are handed over without a copy.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.adapter_files import base_of, is_adapter, refuse_other_tasks, with_saved_adapter
from alignlab.models.attention import ATTENTION, packing_problem, sees_later_tokens
from alignlab.models.config import PolicyConfig
from alignlab.models.download_limits import waits_for_hub
from alignlab.models.families import read_hub_config, write_hub_config
from alignlab.models.folder_limits import check_architecture
from alignlab.models.generation_defaults import writable_generation_config
from alignlab.models.intact import check_folder, named_errors
from alignlab.models.packaged import resolve_checkpoint
from alignlab.models.saving import save_adapter, save_adapter_without_weights, save_without_weights, unsaveable
from alignlab.models.transformer import PolicyForCausalLM, PolicyModel

AutoConfig.register(PolicyConfig.model_type, PolicyConfig, exist_ok=True)
AutoModel.register(PolicyConfig, PolicyModel, exist_ok=True)
AutoModelForCausalLM.register(PolicyConfig, PolicyForCausalLM, exist_ok=True)

_log = logging.getLogger(__name__)
_OPTIONS = {"trust_remote_code": False}
_NO_CHECKPOINT = "A checkpoint must be a Hub id, or a folder with config.json and safetensors"
_ROPE_KEYS = ("rope_theta", "rope_scaling")
_CHOSEN_ELSEWHERE = ("hub_config", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


@waits_for_hub
def load_model(name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> PreTrainedModel | PeftModel:
    """The model of a checkpoint, in evaluation mode, its attention set to "alignlab".

    Known Hub families and our own shapes become a `PolicyForCausalLM`; any other architecture is `transformers`' own.

    Args:
        name: a Hub id, a local folder, or a packaged model. The folder of an adapter gives its base with it on top.

    Raises:
        CheckpointError: it cannot be found, is damaged, has no safetensors, or needs code of its own.
    """
    path = resolve_checkpoint(name)
    if Path(path).is_dir():
        path = str(Path(path).resolve())  # an adapter names its base, and is found from anywhere
        check_folder(path)
    if is_adapter(path):
        refuse_other_tasks(path)
        return with_saved_adapter(_base_model(path, dtype, device), path)
    model: Any = _adopted(_from_hub(name, path, dtype))
    return _with_its_attention(model.to(device).eval())


def _base_model(path: str, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """The base of an adapter's folder."""
    base = base_of(path)
    try:
        model = load_model(base, dtype=dtype, device=device)
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapter {path}: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model


def _check_base(path: str) -> None:
    """See that the base of an adapter's folder is there."""
    base = base_of(path)
    try:
        check_checkpoint(base)
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapter {path}: {error}") from error


@waits_for_hub
def check_checkpoint(name: str) -> None:
    """See that a checkpoint is there, whole where alignlab wrote it, and of a known architecture; nothing is loaded.

    Args:
        name: as for `load_model`. An adapter is looked at with its base.

    Raises:
        CheckpointError: it cannot be found, it is a reward model's adapter, or its folder has no safetensors or a file
            of them that is cut short.
        ConfigError: it is a packaged model, and the package is not installed.
    """
    path = resolve_checkpoint(name)
    if Path(path).is_dir():
        check_folder(path)
        _check_files(name, sorted(Path(path).glob("*.safetensors")))
    if is_adapter(path):
        refuse_other_tasks(path)
        return _check_base(path)
    with named_errors(f"{name} cannot be loaded", _NO_CHECKPOINT):
        config = AutoConfig.from_pretrained(path, **_OPTIONS)
    _refuse_encoder_decoder(name, config)


def _refuse_encoder_decoder(name: str, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{name} is an encoder-decoder ({config.model_type}), and must be a decoder alone, whose prompt and "
            "completion are one sequence; use a causal language model"
        )


@waits_for_hub
def empty_model(name: str) -> PreTrainedModel:
    """A checkpoint's model without its weights, all of whose sizes can be asked for; of an adapter, its base.

    Raises:
        ConfigError, CheckpointError: see `check_checkpoint`.
    """
    check_checkpoint(name)
    path = resolve_checkpoint(name)
    if is_adapter(path):
        return empty_model(base_of(path))
    with named_errors(f"{name} cannot be loaded", "Correct its config.json"), init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **_OPTIONS))
    with named_errors(f"{name} cannot be loaded", "Correct its generation_config.json"), contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)  # without a file, of the config, as in loading
    return _adopted(model)


def _check_files(name: str, files: list[Path]) -> None:
    if not files:
        raise CheckpointError(f"{name} must hold safetensors, and is a folder without; correct the path")
    for file in files:
        try:
            with safe_open(file, "pt"):  # its header says how long the file must be
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged: {error}; copy or save it again") from error


def load_headless(path: str, *, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The decoder of a sequence-classification folder under a language-model head that is tied, and is not to be used.

    Args:
        dtype: default: the checkpoint's.

    Raises:
        CheckpointError: see `load_model`.
    """
    check_folder(path)
    model: Any = _adopted(_from_hub(path, path, dtype or "auto", headless=True))
    return model.to(device).eval()


def _from_hub(name: str, path: str, dtype: torch.dtype | str, *, headless: bool = False) -> PreTrainedModel:
    """`transformers`' own model of a checkpoint, every weight of which is there and used.

    Args:
        headless: the checkpoint has another head than a language model's.
    """
    options = {**_OPTIONS, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if headless:
        options["tie_word_embeddings"] = True
    # An architecture whose attention is its own computes packs padded: "alignlab" is not for it.
    attention = {"attn_implementation": ATTENTION} if _takes_attention(path) else {}
    with named_errors(f"{name} cannot be loaded", f"{_NO_CHECKPOINT}, of an architecture that transformers knows"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options, **attention)
    model, told = loaded
    wrong = {
        kind: sorted(
            str(key)
            for key in told[f"{kind}_keys"]
            if not (str(key).endswith(".expert_load") or (headless and str(key) == "score.weight"))
        )
        for kind in ("missing", "unexpected", "mismatched")
    }
    if any(wrong.values()):
        found = "; ".join(f"{kind} {', '.join(keys[:3])} ({len(keys)} in all)" for kind, keys in wrong.items() if keys)
        raise CheckpointError(
            f"the weights of {name} do not fit its config: {found}; "
            "the checkpoint is damaged, or of another architecture"
        )
    return model


def _takes_attention(path: str) -> bool:
    """Whether the architecture looks its attention up by name."""
    try:
        config = AutoConfig.from_pretrained(path, **_OPTIONS)
        _refuse_encoder_decoder(path, config)
        architecture: Any = AutoModelForCausalLM._model_mapping[type(config)]
        return bool(architecture._supports_attention_backend)
    except CheckpointError:
        raise
    except Exception:
        return True  # what is wrong with it is said when it is loaded


def _with_its_attention(model: PreTrainedModel) -> PreTrainedModel:
    """The model; one whose tokens cannot be packed gets its own attention back, and computes padded batches."""
    if isinstance(model, PolicyForCausalLM):
        return model
    problem = packing_problem(model) if model.config._attn_implementation == ATTENTION else None
    if problem is not None:
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
        _log.warning("%s is computed on padded batches: %s", type(model).__name__, problem.partition(";")[0])
    if sees_later_tokens(model):
        raise CheckpointError(
            f"{model.config.name_or_path} is an encoder ({type(model).__name__}): its tokens see those after them, and "
            "a language model's must not; use a decoder, or set is_decoder to true in its config if it is one"
        )
    return model


def _adopted(hub: PreTrainedModel) -> PreTrainedModel:
    """`hub` as a `PolicyForCausalLM` over the same tensors, where its family is known."""
    try:
        with named_errors(f"{hub.config.name_or_path} cannot be loaded", "Correct its config.json"):
            config = read_hub_config(hub.config)
    except ConfigError as error:
        _log.warning("%s is used as transformers has it: %s", type(hub).__name__, error)
        return hub
    if config is None:
        return hub
    config.hub_config = hub.config.to_diff_dict()
    config.dtype = hub.dtype
    config.name_or_path = hub.config.name_or_path
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = PolicyForCausalLM(config)
    result = model.load_state_dict(hub.state_dict(), strict=False, assign=True)
    model.tie_weights()
    missing = [key for key in result.missing_keys if not key.endswith(".expert_load")]
    if missing or result.unexpected_keys:
        raise CheckpointError(
            f"weights of {hub.config.name_or_path} do not fit its config: missing {missing[:4]}, "
            f"unexpected {result.unexpected_keys[:4]}; the checkpoint is damaged or of another architecture"
        )
    model.generation_config = hub.generation_config
    return model


def new_model(
    architecture: dict[str, Any], *, vocab_size: int, dtype: torch.dtype = torch.float32,
    pad_token_id: int | None = None, bos_token_id: int | None = None, eos_token_id: int | None = None,
) -> PolicyForCausalLM:
    """A model with random weights, from torch's global generator.

    Args:
        architecture: fields of `PolicyConfig`; the vocabulary and the special tokens are the tokenizer's.

    Raises:
        ConfigError: a field is unknown, the combination is impossible, or the model larger than the memory.
    """
    _check_names(architecture)
    check_architecture(architecture, vocab_size, dtype.itemsize)
    tokens: dict[str, Any] = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    try:
        config = PolicyConfig(**architecture, vocab_size=vocab_size, **tokens)
    except StrictDataclassError as error:
        raise ConfigError(f"model.architecture: {error}") from error
    config.dtype = dtype
    model: Any = PolicyForCausalLM(config)
    model.to(dtype)
    for key, value in tokens.items():
        setattr(model.generation_config, key, value)
    return model.eval()


def _check_names(architecture: dict[str, Any]) -> None:
    known = [name for name in PolicyConfig.__annotations__ if name not in _CHOSEN_ELSEWHERE]
    for name in architecture:
        if name in _CHOSEN_ELSEWHERE:
            raise ConfigError(f"model.architecture.{name} is set, and comes from the tokenizer; leave it out")
        if name not in known and name not in _ROPE_KEYS:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            raise ConfigError(f"model.architecture.{name} is not a field of PolicyConfig{hint}")


def save_model(model: PreTrainedModel | PeftModel, folder: str | Path, *, weights: bool = True) -> None:
    """Write a model so that plain `transformers` (and `peft`, for an adapter) loads it.

    A `PolicyForCausalLM` is written as the Hub family that it is isomorphic to, or under its own model type where there
    is none; that one loads wherever `alignlab.models.checkpoints` was imported.

    Args:
        weights: False writes all else, and tries what saving does with the weights: what cannot be saved is known
            before it is trained.

    Raises:
        CheckpointError: the model's generation defaults or tensors cannot be written or, without `weights`, something
            else that is saved.
    """
    if isinstance(model, PeftModel):
        save_adapter(model, folder) if weights else save_adapter_without_weights(model, folder)
        return
    if model.can_generate():
        whose = model.config.name_or_path or type(model).__name__
        model.generation_config = writable_generation_config(model.generation_config, whose)
    hub = write_hub_config(model.config) if isinstance(model, PolicyForCausalLM) else None
    try:
        written = model if hub is None else _as_family(model, hub)
    except RuntimeError as error:  # tensors that the family does not have, such as a buffer that was registered
        raise unsaveable(type(model).__name__, error) from error
    written.save_pretrained(folder) if weights else save_without_weights(written, folder)


def _as_family(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The family's own class over the same tensors."""
    config.dtype = model.dtype
    with no_init_weights(), init_empty_weights(include_buffers=False):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    weights = {key: value for key, value in model.state_dict().items() if not key.endswith(".expert_load")}
    twin.load_state_dict(weights, assign=True)
    twin.tie_weights()
    twin.generation_config = model.generation_config
    return twin


@waits_for_hub
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint, or beside the base of an adapter. Without a padding token, the end token pads.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = resolve_checkpoint(name)
    check_folder(path)
    if is_adapter(path) and not (Path(path) / "tokenizer_config.json").exists():
        return load_tokenizer(base_of(path))
    with named_errors(f"{name} has no tokenizer that can be loaded", "Give model.tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(path, **_OPTIONS)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
