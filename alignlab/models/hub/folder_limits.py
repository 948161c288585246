"""Checks of the JSON files in a model's folder, before a model is built from them: sizes, nesting, paths, counts."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from alignlab.errors import CheckpointError, ConfigError
from alignlab.files.input_files import read_json_object

JSON_FILES = (
    "config.json", "adapter_config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "preprocessor_config.json",
)  # fmt: skip
MAX_LAYERS, MAX_EXPERTS, MAX_SIZE = 4096, 2**16, 2**28
"""Limits of a model's layers and experts, each of which becomes an object, and of any other size."""
MAX_HEADER_BYTES = 10**8
_INDEX = "*.safetensors.index.json"
_LAYERS = re.compile(r"num_(\w+_)?layers|n_layers?|num_(\w+_)?blocks|num_nextn_predict_layers")
_EXPERTS = re.compile(r"n(um)?_(\w+_)?experts(_\w+)?")
_SIZES = re.compile(r"\w+_size|\w+_dim|d_model|n_embd|n_inner|n_heads?|num_(\w+_)?heads|\w+_rank|r")
_FIX = "copy the checkpoint again, or correct the file"


def check_model_folder(folder: Path) -> None:
    """Raise if a model's folder has unreadable JSON files, sizes that no machine holds, or something else than files.

    Raises:
        CheckpointError: with the file and what it says.
    """
    _check_files(folder)
    for name in JSON_FILES:
        if (folder / name).is_file():
            values = read_json_object(folder / name, CheckpointError)
            if name in ("config.json", "adapter_config.json"):
                _check_sizes(folder / name, values)
    for index in folder.glob(_INDEX):
        _check_index(index)
    if (folder / "config.json").is_file():
        _check_layers(folder)


def _check_files(folder: Path) -> None:
    for path in folder.iterdir() if folder.is_dir() else ():
        is_model_file = path.name in JSON_FILES or path.suffix == ".safetensors"
        if path.is_fifo() or (is_model_file and not path.is_file()):
            raise CheckpointError(
                f"{path} must be a file, and is a folder, a pipe or a link that leads to none; {_FIX}"
            )


def _check_sizes(file: Path, values: Mapping[str, Any]) -> None:
    for name, value, limit in _beyond(values):
        raise CheckpointError(f"{file} says {name} {value:.6g}, and it must be at most {limit}; {_FIX}")


def _beyond(values: Mapping[str, Any]) -> Iterator[tuple[str, float, int]]:
    """Yield name, value and limit of each number that is larger than a model's can be."""
    limits = ((_LAYERS, MAX_LAYERS), (_EXPERTS, MAX_EXPERTS), (_SIZES, MAX_SIZE))
    for name, value in _numbers(values):
        limit = next((limit for pattern, limit in limits if pattern.fullmatch(name)), None)
        if limit is not None and value > limit:
            yield name, value, limit


def _numbers(values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield name and value of each number in a config and in its nested configs."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _check_index(index: Path) -> None:
    """Raise if an index names files outside of its folder."""
    files = read_json_object(index, CheckpointError).get("weight_map")
    if not isinstance(files, dict):
        raise CheckpointError(f"{index} must hold a weight_map, from names of tensors to files; {_FIX}")
    for name in files.values():
        if not isinstance(name, str) or Path(name).name != name or name in (".", ".."):
            raise CheckpointError(f"{index} names the file {name!r:.80}, and must name files of its own folder; {_FIX}")


def _check_layers(folder: Path) -> None:
    """Raise if a config has more layers than the weights beside it have tensors."""
    config = read_json_object(folder / "config.json", CheckpointError)
    layers = max((value for name, value in _numbers(config) if _LAYERS.fullmatch(name)), default=0)
    num_tensors = sum(map(_num_tensors, folder.glob("*.safetensors")))
    if num_tensors and layers > num_tensors:
        raise CheckpointError(
            f"{folder / 'config.json'} says {layers:g} layers, and the weights beside it are only {num_tensors} "
            f"tensors; {_FIX}"
        )


def _num_tensors(file: Path) -> int:
    """Return the number of tensors in a safetensors file; 0 for a damaged header, which is refused at loading."""
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else MAX_HEADER_BYTES
        try:
            header = json.loads(opened.read(length)) if length < MAX_HEADER_BYTES else {}
        except (ValueError, RecursionError):
            return 0
    return len(header.keys() - {"__metadata__"}) if isinstance(header, dict) else 0


def check_architecture(architecture: Mapping[str, Any], vocab_size: int, bytes_per_weight: int) -> None:
    """Raise if a new model would be larger than this machine's memory.

    Args:
        architecture: fields of `PolicyConfig`.

    Raises:
        ConfigError: with the size.
    """
    for name, value, limit in _beyond(architecture):
        raise ConfigError(f"model.architecture.{name} is {value:.6g}, and must be at most {limit}; use a smaller one")
    size = _num_weights(architecture, vocab_size) * bytes_per_weight
    memory = psutil.virtual_memory().total
    if size > memory:
        raise ConfigError(
            f"model.architecture describes a model of about {size / 2**30:.0f} GiB, and this machine has "
            f"{memory / 2**30:.0f} GiB of memory; use fewer or smaller layers"
        )


def _num_weights(architecture: Mapping[str, Any], vocab_size: int) -> float:
    """Return a rough lower bound of a new model's number of weights."""
    from alignlab.models.config import PolicyConfig

    def field(name: str) -> float:
        value = architecture.get(name, getattr(PolicyConfig, name, None))
        return float(value) if isinstance(value, int | float) else 0.0

    hidden = field("hidden_size")
    experts = field("num_experts")
    matrices = 3 if architecture.get("mlp_gated", True) else 2
    mlp = matrices * hidden * (experts * field("moe_intermediate_size") if experts else field("intermediate_size"))
    blocks = architecture.get("shared_layers")
    layers = len({str(block) for block in blocks}) if isinstance(blocks, list) else field("num_hidden_layers")
    return vocab_size * hidden + layers * (2 * hidden * hidden + mlp)
