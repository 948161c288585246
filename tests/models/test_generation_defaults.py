"""Generation defaults that contradict themselves are written with their meaning; others are refused by name."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from alignlab.errors import CheckpointError, ConfigError
from alignlab.models.decoder import end_ids
from alignlab.models.hub.checkpoints import empty_model, load_model, new_model, save_model
from alignlab.models.hub.generation_defaults import writable_generation_config
from alignlab.models.layer_pruning import student_from

TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def checkpoint(folder: Path, **defaults: Any) -> Path:
    """A model whose generation_config.json holds `defaults` too."""
    save_model(new_model(TINY, vocab_size=30, eos_token_id=2, pad_token_id=0), folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | defaults))
    return folder


def saved_defaults(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "generation_config.json").read_text())


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.9, "top_p": 0.6}, {"top_k": 10}, {"min_p": 0.1}, {"typical_p": 0.5}, {"top_h": 0.4},
        {"epsilon_cutoff": 0.1}, {"eta_cutoff": 0.1},
    ],
)  # fmt: skip
def test_sampling_fields_without_do_sample_are_saved_as_sampling(fields: dict[str, Any], tmp_path: Path) -> None:
    model = load_model(str(checkpoint(tmp_path / "a", **fields)), dtype=torch.float32)
    save_model(model, tmp_path / "b")
    defaults = saved_defaults(tmp_path / "b")
    assert defaults["do_sample"] is True and {name: defaults[name] for name in fields} == fields
    assert defaults["eos_token_id"] == 2


@pytest.mark.parametrize(
    ("fields", "removed"),
    [
        ({"do_sample": False, "temperature": 0.9, "top_k": 5}, ("temperature", "top_k")),
        ({"temperature": 0.0}, ("temperature",)),
        ({"early_stopping": True, "length_penalty": 2.0}, ("early_stopping", "length_penalty")),
        ({"use_cache": False, "cache_implementation": "static"}, ("cache_implementation",)),
        ({"output_scores": True}, ("output_scores",)),
        ({"pad_token_id": -1}, ("pad_token_id",)),
    ],
)
def test_fields_without_an_effect_are_left_out(
    fields: dict[str, Any], removed: tuple[str, ...], tmp_path: Path
) -> None:
    model = load_model(str(checkpoint(tmp_path / "a", **fields)), dtype=torch.float32)
    save_model(model, tmp_path / "b")
    defaults = saved_defaults(tmp_path / "b")
    assert all(defaults.get(name) is None for name in removed) and defaults.get("do_sample") is not True


def test_a_repair_of_the_defaults_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load_model(str(checkpoint(tmp_path / "a", temperature=0.9)), dtype=torch.float32)
    with caplog.at_level(logging.WARNING, logger="alignlab"):
        save_model(model, tmp_path / "b", weights=False)
        save_model(model, tmp_path / "c")
    [record] = [r for r in caplog.records if "generation defaults" in r.message]
    assert "do_sample is set to true, which temperature 0.9" in record.message


def test_defaults_that_can_be_written_stay_as_they_are() -> None:
    config = GenerationConfig(do_sample=True, temperature=0.7, eos_token_id=[1, 2])
    assert writable_generation_config(config, "a model") is config


def test_contradictory_defaults_are_refused(tmp_path: Path) -> None:
    config = GenerationConfig()
    config.temperature = "hot"  # type: ignore[assignment]
    with pytest.raises(CheckpointError, match="temperature 'hot', which must be a number"):
        writable_generation_config(config, "a model")
    config = GenerationConfig()
    config.num_return_sequences = 3
    with pytest.raises(CheckpointError, match="num_return_sequences"):
        writable_generation_config(config, "a model")
    folder = str(checkpoint(tmp_path, max_new_tokens=0))
    for load in (lambda: empty_model(folder), lambda: load_model(folder, dtype=torch.float32)):
        with pytest.raises(CheckpointError, match="max_new_tokens"):
            load()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "it is no JSON"), ("[1]", "it must hold one object, and holds list"), ("\x00", "it is no JSON"),
        ('{"eos_token_id": "x"}', "eos_token_id 'x', which must be a token id or a list of them"),
        ('{"eos_token_id": [2, "x"]}', "eos_token_id"), ('{"eos_token_id": 2.5}', "eos_token_id"),
        ('{"temperature": "hot"}', "temperature 'hot', which must be a number"),
        ('{"do_sample": "yes"}', "do_sample 'yes', which must be true"),
        ('{"pad_token_id": [0]}', "pad_token_id"), ('{"max_new_tokens": "many"}', "max_new_tokens"),
    ],
)  # fmt: skip
def test_a_broken_file_of_defaults_is_refused_by_its_name(text: str, named: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "generation_config.json").write_text(text)
    for load in (lambda: empty_model(str(folder)), lambda: load_model(str(folder), dtype=torch.float32)):
        with pytest.raises(CheckpointError, match=f"generation_config.json .*{named}"):
            load()


def test_a_model_without_a_file_of_defaults_loads(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    (folder / "generation_config.json").unlink()
    assert end_ids(empty_model(str(folder))) == end_ids(load_model(str(folder), dtype=torch.float32)) == {2}


def test_an_end_token_of_the_config_that_is_no_id_is_refused_by_name(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": "x"}))
    for load in (lambda: empty_model(str(folder)), lambda: load_model(str(folder), dtype=torch.float32)):
        with pytest.raises(CheckpointError, match=r"cannot be loaded: (?s:.*)eos_token_id"):
            load()


def test_a_live_model_whose_end_is_no_id_is_refused_by_name() -> None:
    model = new_model(TINY, vocab_size=30, eos_token_id=2)
    model.generation_config.eos_token_id = [2, "x"]
    with pytest.raises(ConfigError, match=r"generation_config.eos_token_id is \[2, 'x'\], and must be a token id"):
        end_ids(model)


def test_a_student_takes_the_defaults_over(tmp_path: Path) -> None:
    teacher = load_model(str(checkpoint(tmp_path / "a", temperature=0.9)), dtype=torch.float32)
    save_model(student_from(teacher, [1]), tmp_path / "b")
    assert saved_defaults(tmp_path / "b")["do_sample"] is True


def test_a_model_without_weights_has_the_defaults_of_its_folder(tmp_path: Path) -> None:
    model = empty_model(str(checkpoint(tmp_path, temperature=0.9)))
    assert model.generation_config.temperature == 0.9 and model.device.type == "meta"
