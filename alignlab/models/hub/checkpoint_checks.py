"""Checks of a checkpoint, of which nothing is loaded."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from alignlab.errors import CheckpointError
from alignlab.models.hub.adapter_files import base_of, is_adapter, refuse_other_tasks
from alignlab.models.hub.download_limits import waits_for_hub
from alignlab.models.hub.families import FAMILIES
from alignlab.models.hub.intact import check_folder, named_errors
from alignlab.models.hub.packaged import resolve_checkpoint

_DEQUANTIZERS = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""Config of `transformers` by which a method's weights are dequantised, by `quant_method`."""
NO_CHECKPOINT = "A checkpoint must be a Hub id, or a folder with config.json and safetensors"


@waits_for_hub
def check_checkpoint(name: str) -> None:
    """Raise if a checkpoint is missing, damaged, or of an unknown architecture; nothing is loaded.

    Args:
        name: as for `load_model`. An adapter is checked together with its base.

    Raises:
        CheckpointError: it cannot be found, it is a reward model's adapter, its weights are quantised, or its folder
            has no safetensors or a file of them that is cut short.
        ConfigError: it is a packaged model, and the package is not installed.
    """
    path = resolve_checkpoint(name)
    if Path(path).is_dir():
        check_folder(path)
        _check_files(name, sorted(Path(path).glob("*.safetensors")))
    if is_adapter(path):
        refuse_other_tasks(path)
        return _check_base(path)
    with named_errors(f"{name} cannot be loaded", NO_CHECKPOINT):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    refuse_encoder_decoder(name, config)
    refuse_quantized(name, config)


def _check_base(path: str) -> None:
    """Raise if the base of an adapter's folder is not usable."""
    base = base_of(path)
    try:
        check_checkpoint(base)
    except CheckpointError as error:
        raise CheckpointError(f"the base of the adapter {path}: {error}") from error


def _check_files(name: str, files: list[Path]) -> None:
    if not files:
        raise CheckpointError(f"{name} must hold safetensors, and is a folder without; correct the path")
    for file in files:
        try:
            with safe_open(file, "pt"):  # its header says how long the file must be
                pass
        except SafetensorError as error:
            raise CheckpointError(f"{file} is damaged: {error}; copy or save it again") from error


def refuse_quantized(name: str, config: PreTrainedConfig) -> None:
    """Raise a CheckpointError if the weights are quantised, of a family whose weights are ours to train.

    `transformers` would keep some methods' weights as they are, and none of those can be trained or written back.
    """
    settings = getattr(config, "quantization_config", None)
    if not settings or config.model_type not in FAMILIES:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    options = f", quantization_config={_DEQUANTIZERS[method]}(dequantize=True)" if method in _DEQUANTIZERS else ""
    raise CheckpointError(
        f"{name} has weights that are quantised ({method}), and must have them in bfloat16, float16 or float32 to be "
        "trained and written back; dequantise it first, and give that folder: "
        f"AutoModelForCausalLM.from_pretrained({name!r}, dtype='bfloat16'{options}).save_pretrained(folder)"
    )


def refuse_encoder_decoder(name: str, config: PreTrainedConfig) -> None:
    """Raise a CheckpointError if a config is not of a decoder alone."""
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"{name} is an encoder-decoder ({config.model_type}), and must be a decoder alone, whose prompt and "
            "completion are one sequence; use a causal language model"
        )
