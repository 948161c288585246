"""Folders that alignlab wrote: no flipped bit is loaded, and a deliberate change is possible without the manifest."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignlab.config.model import LoraSettings
from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import CheckpointError
from alignlab.files.manifest import MODEL_MANIFEST, write_manifest
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import check_checkpoint, load_model, load_tokenizer, save_model
from alignlab.models.hub.reward_checkpoints import load_reward_model, padded_tokenizer, save_reward_model
from alignlab.models.reward_model import RewardModel

Load = Callable[[str], Any]


def load_policy(folder: str) -> Any:
    return load_model(folder, dtype=torch.float32)


@pytest.fixture
def folders(tmp_path: Path, llama: Any) -> dict[str, tuple[Path, tuple[Load, ...]]]:
    """A model, an adapter and a reward model with its tokenizer, by name, with the functions that read each."""
    tokenizer = train_tokenizer(["ab"], vocab_size=262)
    base, adapter, reward = (tmp_path / name for name in ("model", "adapter", "reward"))
    save_model(llama, base)
    save_model(add_lora(load_policy(str(base)), LoraSettings(rank=2)), adapter)
    tokenizer.save_pretrained(adapter)
    padded = padded_tokenizer(tokenizer)
    padded.pad_token = padded.convert_ids_to_tokens(3)
    save_reward_model(RewardModel(load_policy(str(base))), reward, padded)
    for folder in (base, adapter, reward):
        write_manifest(folder)
    return {
        "model": (base, (load_policy, check_checkpoint)),
        "adapter": (adapter, (load_policy, check_checkpoint, load_tokenizer)),
        "reward": (reward, (load_reward_model, load_tokenizer)),
    }


@pytest.mark.parametrize("name", ["model", "adapter", "reward"])
def test_no_flipped_bit_is_loaded(folders: Any, name: str) -> None:
    folder, loaders = folders[name]
    for load in loaders:
        load(str(folder))
    draw = random.Random(0)
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        for position in {0, len(content) // 2, len(content) - 2, draw.randrange(len(content))}:
            flipped = bytearray(content)
            flipped[position] ^= 1 << draw.randrange(8)
            file.write_bytes(flipped)
            for load in loaders:
                with pytest.raises(CheckpointError, match=rf"{file}.*make it again.*remove its {MODEL_MANIFEST}"):
                    load(str(folder))
        file.write_bytes(content)
    for load in loaders:
        load(str(folder))


def test_a_file_that_the_user_has_changed_is_read_without_the_manifest(folders: Any) -> None:
    folder, _ = folders["model"]
    load_policy(str(folder))  # that the folder was read before does not hide the change
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_new_tokens": 7}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json has \d+ bytes.*changed it yourself, remove"):
        load_policy(str(folder))
    (folder / MODEL_MANIFEST).unlink()
    assert load_policy(str(folder)).generation_config.max_new_tokens == 7


def test_extra_files_beside_the_manifest_are_accepted(folders: Any) -> None:
    folder, _ = folders["model"]
    (folder / "notes.txt").write_text("mine")
    assert load_policy(str(folder)).config.vocab_size


ADAPTERS = {
    "it holds no tensor": lambda tensors: {},
    "is no tensor of finite numbers": lambda tensors: {k: t * float("nan") for k, t in tensors.items()},
    r"lora_A\.weight is no tensor of finite numbers": lambda tensors: {k: t.int() for k, t in tensors.items()},
    "Found missing adapter keys.*lora_B": lambda tensors: {k: t for k, t in tensors.items() if "lora_B" not in k},
    "size mismatch": lambda tensors: {k: t.T.contiguous() for k, t in tensors.items()},
}


@pytest.mark.parametrize("message", ADAPTERS)
def test_an_adapter_of_others_must_have_its_tensors(folders: Any, message: str) -> None:
    folder, _ = folders["adapter"]
    (folder / MODEL_MANIFEST).unlink()
    file = folder / "adapter_model.safetensors"
    save_file(ADAPTERS[message](load_file(file)), file)
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        load_policy(str(folder))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\xfe"])
def test_damage_in_a_folder_of_others_has_a_name(folders: Any, file: str, content: bytes) -> None:
    folder, loaders = folders["reward"]
    (folder / MODEL_MANIFEST).unlink()
    (folder / file).write_bytes(content)
    with pytest.raises(CheckpointError):
        loaders[file.startswith("tokenizer")](str(folder))
