"""Folders of models with impossible sizes or unreadable files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.data.tokenizer_training import train_tokenizer
from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.hub.checkpoints import check_checkpoint, load_model, load_tokenizer, new_model, save_model

SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 1, "intermediate_size": 8}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["ab"], vocab_size=260)
    save_model(new_model(SHAPE, vocab_size=260), folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def check_refused(folder: Path, named: str) -> None:
    for use in (check_checkpoint, load_tokenizer, lambda name: load_model(name, dtype=torch.float32)):
        with pytest.raises(CheckpointError, match=named):
            use(str(folder))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 10**7}, r"config.json says num_hidden_layers 1e\+07, and it must be at most 4096"),
        ({"num_hidden_layers": 10**30}, r"num_hidden_layers 1e\+30"),
        ({"num_hidden_layers": 4000}, "says 4000 layers, and the weights beside it are only"),
        ({"text_config": {"n_layer": 10**7}}, "says n_layer"),
        ({"num_local_experts": 10**7}, "says num_local_experts"),
        ({"vocab_size": 10**12}, "says vocab_size"),
    ],
)
def test_a_config_of_more_than_a_model_can_have_is_refused(folder: Path, changes: Any, named: str) -> None:
    change(folder / "config.json", **changes)
    check_refused(folder, named)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize(
    ("text", "named"),
    [
        ('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", "cannot be read: it is nested too deeply"),
        ('{"a": ' + "9" * 5000 + "}", "cannot be read: it is no JSON: Exceeds the limit"),
        ("[]", "cannot be read: it must hold one object, and holds list"),
        ("{", "cannot be read: it is no JSON"),
        ('{"a": "\udcff"}', "must be text in UTF-8"),
    ],
)
def test_json_that_cannot_be_read_is_named(folder: Path, name: str, text: str, named: str) -> None:
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    check_refused(folder, rf"{name} {named}")


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"a": "../x.safetensors"}, r"names the file '../x.safetensors', and must name files of its own folder"),
        ({"a": "/etc/passwd"}, "names the file '/etc/passwd'"),
        ({"a": 3}, "names the file 3"),
        ([], "must hold a weight_map"),
    ],
)
def test_an_index_names_files_of_its_own_folder_alone(folder: Path, weights: Any, named: str) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    check_refused(folder, named)


def test_a_folder_as_it_was_saved_is_read(folder: Path) -> None:
    check_checkpoint(str(folder))
    load_tokenizer(str(folder))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 10**7}, r"model.architecture.num_hidden_layers is 1e\+07, and must be at most 4096"),
        ({"num_hidden_layers": 4000, "hidden_size": 2**20}, "a model of about .* GiB, and this machine has"),
    ],
)
def test_a_new_model_beyond_the_memory_is_refused(changes: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        new_model(SHAPE | changes, vocab_size=260)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer_config.json"])
def test_a_pipe_a_folder_or_a_broken_link_in_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    """Reading a pipe would block for ever, and a folder was treated as a missing file."""
    file = folder / name
    for make in (file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("nowhere")):
        file.unlink()
        make()
        check_refused(folder, rf"{name} must be a file, and is a folder, a pipe or a link that leads to none")
        if file.is_dir():
            file.rmdir()
            file.touch()
