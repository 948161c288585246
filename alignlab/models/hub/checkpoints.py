"""Loading and saving of models: Hub families (unchanged in both directions), our own shapes, adapters.

`transformers` reads and writes every Hub checkpoint, and converts names. In memory, the weights of the families in
`families.py` have our names, so our model takes them over without a copy.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from alignlab.errors import AlignlabError, CheckpointError, ConfigError
from alignlab.models.architectures import architecture_fields
from alignlab.models.config import PolicyConfig
from alignlab.models.decoder import packing_problem, sees_later_tokens
from alignlab.models.empty import loads_weights, put_on
from alignlab.models.hub.adapter_files import (
    base_of,
    is_adapter,
    refuse_other_tasks,
    with_empty_adapter,
    with_saved_adapter,
)
from alignlab.models.hub.checkpoint_checks import (
    NO_CHECKPOINT,
    check_checkpoint,
    refuse_encoder_decoder,
    refuse_quantized,
)
from alignlab.models.hub.download_limits import waits_for_hub
from alignlab.models.hub.families import read_hub_config, write_hub_config
from alignlab.models.hub.folder_limits import check_architecture
from alignlab.models.hub.generation_defaults import check_generation_file, writable_generation_config
from alignlab.models.hub.intact import check_folder, named_errors
from alignlab.models.hub.loading_report import check_loaded
from alignlab.models.hub.mtp_files import add_layer, refuse_mtp
from alignlab.models.hub.packaged import resolve_checkpoint
from alignlab.models.hub.saving import save_adapter, save_adapter_without_weights, save_without_weights, unsaveable
from alignlab.models.hub.streaming import fill
from alignlab.models.hub.written_models import as_family, as_own_class, with_mtp_layer
from alignlab.models.layout import ATTENTION
from alignlab.models.router_state import is_router_state
from alignlab.models.transformer import PolicyForCausalLM
from alignlab.models.weight_view import WeightView, view_of

_log = logging.getLogger(__name__)
_OPTIONS = {"trust_remote_code": False}
_FILES = ("*.json", "model*.safetensors")
"""Those of a model on the Hub that are downloaded."""
_UNREADABLE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError,
    StrictDataclassError,
)  # fmt: skip


@waits_for_hub
def load_model(
    name: str, *, dtype: torch.dtype, device: torch.device | str = "cpu", mtp: bool = False
) -> PreTrainedModel | PeftModel:
    """Load the model of a checkpoint, in evaluation mode, with attention "alignlab".

    Known Hub families and our own shapes become a `PolicyForCausalLM`; any other architecture is `transformers`' own.

    Args:
        name: a Hub id, a local folder, or a packaged model. The folder of an adapter gives its base with it on top.
        mtp: with the layer for multi-token prediction that the files of DeepSeek-V3 hold, see `mtp_files`.

    Raises:
        CheckpointError: it cannot be found, is damaged, has no safetensors, or needs code of its own; or has no layer
            for multi-token prediction.
    """
    if not loads_weights():
        return _without_weights(name, dtype, mtp=mtp)
    path = resolve_checkpoint(name)
    if Path(path).is_dir():
        path = str(Path(path).resolve())  # an adapter names its base, and is found from anywhere
        check_folder(path)
    if is_adapter(path):
        refuse_mtp(mtp, f"{name} is an adapter")
        refuse_other_tasks(path)
        return with_saved_adapter(_base_model(path, dtype, device), path)
    model: Any = _streamed(path, dtype, torch.device(device), mtp)
    if model is None:
        model = _adopted(_from_hub(name, path, dtype))
        refuse_mtp(mtp, f"{name} is a {type(model).__name__} whose files are read by transformers")
    return _with_its_attention(model.to(device).eval())


def _streamed(path: str, dtype: torch.dtype, device: torch.device, mtp: bool) -> PolicyForCausalLM | None:
    """Load a checkpoint as ours tensor by tensor; None if its family, or a tensor of its files, is unknown here.

    What cannot be read is left to transformers too, whose reasons are named errors.
    """
    try:
        config = AutoConfig.from_pretrained(path, **_OPTIONS)
        refuse_quantized(path, config)
        if not isinstance(config, PolicyConfig) and read_hub_config(config) is None:
            return None
        folder = path if Path(path).is_dir() else snapshot_download(path, allow_patterns=list(_FILES))
        with no_init_weights(), init_empty_weights(include_buffers=False):
            hub = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # of buffers, which have values
        hub.config.dtype = dtype
        with no_init_weights():
            model = _adopted(hub)
    except (*_UNREADABLE, AlignlabError):
        return None
    if mtp:
        add_layer(model, folder)
    if not isinstance(model, PolicyForCausalLM) or not fill(model, Path(folder), dtype=dtype, device=device):
        return None
    model.config.dtype = dtype
    check_generation_file(path)
    _read_generation_config(model, path, path)
    return model


def _without_weights(name: str, dtype: torch.dtype, *, mtp: bool) -> PreTrainedModel | PeftModel:
    """Return what `load_model` does, on the meta device.

    Whether tokens of an architecture that is `transformers`' own can be packed shows in a forward pass alone, and is
    taken for granted.
    """
    path: str = resolve_checkpoint(name)
    model: Any = empty_model(name).eval()
    if mtp:
        add_layer(model, path)
    model.to(dtype)
    if not isinstance(model, PolicyForCausalLM) and _takes_attention(base_of(path) if is_adapter(path) else path):
        model.set_attn_implementation(ATTENTION)
    return with_empty_adapter(model, path) if is_adapter(path) else model


def _base_model(path: str, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """Load the base of an adapter's folder."""
    base = base_of(path)
    try:
        model = load_model(base, dtype=dtype, device=device)
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapter {path}: {error}") from error
    assert isinstance(model, PreTrainedModel)
    return model


@waits_for_hub
def empty_model(name: str) -> PreTrainedModel:
    """Return a checkpoint's model on the meta device, with all shapes and no weights; of an adapter, its base.

    Raises:
        ConfigError, CheckpointError: see `check_checkpoint`; or a local folder's weights have other names or shapes
            than its config.json says.
    """
    check_checkpoint(name)
    path = resolve_checkpoint(name)
    if is_adapter(path):
        return empty_model(base_of(path))
    check_generation_file(path)
    if Path(path).is_dir():  # of one on the Hub, the weights would be downloaded
        check_shapes(name, path)
    with named_errors(f"{name} cannot be loaded", "Correct its config.json"), init_empty_weights():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, **_OPTIONS))
    _read_generation_config(model, name, path)
    return _adopted(model)


def _read_generation_config(model: PreTrainedModel, name: str, path: str) -> None:
    """Set a model's generation defaults to those of its checkpoint; without a file they are the config's."""
    with named_errors(f"{name} cannot be loaded", "Correct its generation_config.json"), contextlib.suppress(OSError):
        model.generation_config = GenerationConfig.from_pretrained(path)


def check_shapes(name: str, path: str, *, headless: bool = False) -> None:
    """Raise if the weights of a local folder have other names or shapes than its config.json says; none is read.

    Args:
        headless: see `load_headless`.

    Raises:
        CheckpointError: naming the first of them.
    """
    _from_hub(name, path, "auto", headless=headless, device="meta")


def load_headless(path: str, *, dtype: torch.dtype | None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load the decoder of a sequence-classification folder, under a tied language-model head that stands unused.

    Args:
        dtype: default: the checkpoint's.

    Raises:
        CheckpointError: see `load_model`.
    """
    check_folder(path)
    device_of_tensors = None if loads_weights() else "meta"
    model: Any = _adopted(_from_hub(path, path, dtype or "auto", headless=True, device=device_of_tensors))
    put_on(model, torch.device(device))
    return model.eval()


def _from_hub(
    name: str, path: str, dtype: torch.dtype | str, *, headless: bool = False, device: str | None = None
) -> PreTrainedModel:
    """Load `transformers`' own model of a checkpoint, and check that every weight is present and used.

    Args:
        headless: the checkpoint has another head than a language model's.
        device: "meta" reads the files' headers alone.
    """
    options: dict[str, Any] = {**_OPTIONS, "dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    if headless:
        options["tie_word_embeddings"] = True
    if device is not None:
        options["device_map"] = device
    check_generation_file(path)
    # An architecture whose attention is its own computes packs padded: "alignlab" is not for it.
    attention = {"attn_implementation": ATTENTION} if _takes_attention(path) else {}
    with named_errors(f"{name} cannot be loaded", f"{NO_CHECKPOINT}, of an architecture that transformers knows"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, **options, **attention)
    model, report = loaded
    check_loaded(report, model.config, name, headless=headless)
    return model


def _takes_attention(path: str) -> bool:
    """Return True if the architecture looks up its attention function by name."""
    try:
        config = AutoConfig.from_pretrained(path, **_OPTIONS)
        refuse_encoder_decoder(path, config)
        refuse_quantized(path, config)
        architecture: Any = AutoModelForCausalLM._model_mapping[type(config)]
        return bool(architecture._supports_attention_backend)
    except CheckpointError:
        raise
    except Exception:
        return True  # loading raises the error


def _with_its_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model, with its own attention on padded batches if its tokens cannot be packed."""
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
    """Return `hub` as a `PolicyForCausalLM` over the same tensors if its family is known, and `hub` otherwise."""
    try:
        with named_errors(f"{hub.config.name_or_path} cannot be loaded", "Correct its config.json"):
            config = read_hub_config(hub.config)
    except ConfigError as error:
        _log.warning("%s is used as transformers has it: %s", type(hub).__name__, error)
        return hub
    if config is None:
        return hub
    if config.max_position_embeddings < hub.config.max_position_embeddings:
        _log.warning(
            "%s takes sequences of up to %d tokens here: LongRoPE's factors for longer ones would depend on the batch",
            hub.config.name_or_path or type(hub).__name__, config.max_position_embeddings,
        )  # fmt: skip
    config.hub_config = hub.config.to_diff_dict()
    config.dtype = hub.dtype
    config.name_or_path = hub.config.name_or_path
    with no_init_weights(), init_empty_weights(include_buffers=False):
        model = PolicyForCausalLM(config)
    result = model.load_state_dict(hub.state_dict(), strict=False, assign=True)
    model.tie_weights()
    missing = [key for key in result.missing_keys if not is_router_state(key)]
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
    """Make a model with random weights from torch's global generator.

    Args:
        architecture: fields of `PolicyConfig`, with those of the `preset` that it names, if any; the vocabulary and the
            special tokens are the tokenizer's.

    Raises:
        ConfigError: a field or the preset is unknown, the combination is impossible, or the model larger than the
            memory.
    """
    fields = architecture_fields(architecture)
    check_architecture(fields, vocab_size, dtype.itemsize)
    tokens: dict[str, Any] = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
    try:
        config = PolicyConfig(**fields, vocab_size=vocab_size, **tokens)
    except StrictDataclassError as error:
        raise ConfigError(f"model.architecture: {error}") from error
    config.dtype = dtype
    model: Any = PolicyForCausalLM(config)
    model.to(dtype)
    for key, value in tokens.items():
        setattr(model.generation_config, key, value)
    return model.eval()


def save_model(
    model: PreTrainedModel | PeftModel, folder: str | Path, *, weights: bool = True, view: WeightView | None = None
) -> None:
    """Write a model so that plain `transformers` (and `peft`, for an adapter) loads it.

    A `PolicyForCausalLM` is written as the Hub family that it is isomorphic to, or under its own model type where there
    is none; that one loads wherever `alignlab.models.hub.checkpoints` was imported.

    Args:
        weights: False writes everything else and tries the conversion of the weights, so that a model that cannot be
            saved is refused before it is trained.
        view: of the model's weights; default: `view_of` it.

    Raises:
        CheckpointError: the model's generation defaults or tensors cannot be written or, without `weights`, something
            else that is saved.
    """
    if isinstance(model, PeftModel):
        save_adapter(model, folder, view) if weights else save_adapter_without_weights(model, folder)
        return
    if model.can_generate():
        whose = model.config.name_or_path or type(model).__name__
        model.generation_config = writable_generation_config(model.generation_config, whose)
    view = view or view_of(model)
    hub = write_hub_config(model.config) if isinstance(model, PolicyForCausalLM) else None
    try:
        written = as_own_class(model, view) if hub is None else as_family(model, hub, view)
    except RuntimeError as error:  # tensors that the family does not have, such as a registered buffer
        raise unsaveable(type(model).__name__, error) from error
    if weights:
        written.save_pretrained(folder, state_dict=with_mtp_layer(model, written, view))
    else:
        save_without_weights(written, folder)


@waits_for_hub
def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint, or of an adapter's base. Without a padding token, the end token pads.

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
