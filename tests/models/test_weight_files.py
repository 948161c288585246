"""Weights are read tensor by tensor onto their device, equal to those that transformers loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from alignlab.config.model import LoraSettings
from alignlab.errors import CheckpointError
from alignlab.models.adapters import add_lora
from alignlab.models.hub import checkpoints
from alignlab.models.hub.checkpoints import load_model, new_model, save_model
from alignlab.models.hub.weight_files import WeightFiles
from alignlab.models.transformer import PolicyForCausalLM
from tests.models.test_checkpoints import MOE, TINY, hub_folder
from tests.models.test_parity import HUB


@pytest.fixture
def streamed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which transformers loads no weights."""

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("transformers has loaded the weights")

    monkeypatch.setattr(checkpoints, "_from_hub", refuse)


def state_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HUB)
def test_a_family_is_read_as_transformers_reads_it(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_folder(name, tmp_path)
    streamed: Any = load_model(str(tmp_path), dtype=dtype)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_streamed", lambda *_: None)
        expected: Any = load_model(str(tmp_path), dtype=dtype)
    assert type(streamed) is PolicyForCausalLM and not streamed.training
    states = [state_of(model) for model in (streamed, expected)]
    assert states[0].keys() == states[1].keys()
    for key, tensor in states[1].items():
        if "kimi" in name and key.endswith("e_score_correction_bias"):  # transformers rounds it, in this family alone
            assert states[0][key].dtype == torch.float32
            states[0][key] = states[0][key].to(tensor.dtype)
        assert states[0][key].dtype == tensor.dtype and torch.equal(states[0][key], tensor), key
    assert [p.requires_grad for p in streamed.parameters()] == [p.requires_grad for p in expected.parameters()]
    assert streamed.config.to_dict() == expected.config.to_dict()
    assert streamed.generation_config.to_dict() == expected.generation_config.to_dict()
    tied = [m.get_input_embeddings().weight is m.get_output_embeddings().weight for m in (streamed, expected)]
    assert tied[0] == tied[1]


@pytest.mark.parametrize("name", HUB)
def test_no_family_needs_the_loading_of_transformers(name: str, tmp_path: Path, streamed_alone: None) -> None:
    hub_folder(name, tmp_path)
    model: Any = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_several_files_and_an_adapters_base(tmp_path: Path, streamed_alone: None) -> None:
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(HUB["qwen3-moe"]())
    theirs.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    base: Any = load_model(str(tmp_path / "base"), dtype=torch.float32)
    save_model(add_lora(base, LoraSettings(rank=2)), tmp_path / "adapter")
    again: Any = load_model(str(tmp_path / "adapter"), dtype=torch.float32)
    for key, tensor in theirs.state_dict().items():
        if not key.endswith("inv_freq"):
            assert torch.equal(again.base_model.model.state_dict()[_adapted(key, again)], tensor), key


def _adapted(key: str, model: Any) -> str:
    """The name of a base's tensor under an adapter."""
    return key if key in model.base_model.model.state_dict() else key.replace(".weight", ".base_layer.weight")


def test_a_shape_of_our_own_with_a_balancing_bias(tmp_path: Path, streamed_alone: None) -> None:
    model = new_model(TINY | MOE | {"router_bias_update_rate": 0.1, "n_shared_experts": 1}, vocab_size=30)
    for name, buffer in model.named_buffers():
        if name.endswith(("correction_bias", "expert_load")):
            buffer.uniform_()
    save_model(model, tmp_path)
    loaded: Any = load_model(str(tmp_path), dtype=torch.bfloat16)
    biases = [buffer for name, buffer in loaded.named_buffers() if "bias" in name]
    assert biases and {bias.dtype for bias in biases} == {torch.float32}
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            assert torch.equal(loaded.get_buffer(name), buffer), name


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3-moe"])
def test_a_shard_of_each_tensor_can_be_read_alone(name: str, tmp_path: Path) -> None:
    hub_folder(name, tmp_path)
    model: Any = load_model(str(tmp_path), dtype=torch.float32)
    files = WeightFiles(tmp_path)
    for key, parameter in model.named_parameters():
        pieces = files.pieces(key, parameter.shape)
        assert pieces is not None, key
        for rows in (slice(0, 1), slice(1, 3), slice(len(parameter) - 1, None)):
            out = torch.full_like(parameter[rows], -1.0, dtype=torch.float64)
            files.read(pieces, out, rows)
            assert torch.equal(out, parameter[rows].detach().double()), key


def test_a_tensor_too_many_or_too_few_is_named(tmp_path: Path) -> None:
    hub_folder("qwen3-moe", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    first = next(name for name in tensors if ".experts.1." in name)
    for changed in (
        {name: tensor for name, tensor in tensors.items() if name != first},
        tensors | {"model.layers.9.mlp.up_proj.weight": torch.zeros(2, 2)},
        tensors | {first: torch.zeros(3, 5)},
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(CheckpointError):
            load_model(str(tmp_path), dtype=torch.float32)


def test_a_model_of_the_hub_is_read_from_its_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed_alone: None
) -> None:
    theirs = hub_folder("llama", tmp_path)
    read = AutoConfig.from_pretrained
    asked = []
    monkeypatch.setattr(checkpoints.AutoConfig, "from_pretrained", lambda name, **options: read(tmp_path, **options))
    monkeypatch.setattr(
        checkpoints, "snapshot_download", lambda name, allow_patterns: asked.append(name) or str(tmp_path)
    )
    monkeypatch.setattr(checkpoints, "check_generation_file", lambda path: None)
    ours: Any = load_model("owner/model", dtype=torch.float32)
    assert asked == ["owner/model"]
    assert torch.equal(ours.model.norm.weight, theirs.model.norm.weight)


MEASURE = """
import sys, torch
from alignlab.models.hub.checkpoints import load_model
import alignlab.models.adapters
def status(name):
    return int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
model = load_model(sys.argv[1], dtype=torch.bfloat16)
print(status("VmHWM") - before, sum(p.numel() * p.element_size() for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_a_mixture_is_loaded_with_no_more_memory_than_its_weights_and_a_tensor(tmp_path: Path) -> None:
    """transformers stacks the experts of a layer in a second copy of them, beside the pages of the files."""
    shape = TINY | {"hidden_size": 256, "num_hidden_layers": 4, "num_experts": 16, "num_experts_per_tok": 2}
    model = new_model(shape | {"moe_intermediate_size": 768, "use_qk_norm": True}, vocab_size=1000)
    largest = max(parameter.numel() for parameter in model.parameters()) * 4
    save_model(model, tmp_path)
    del model
    command = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    peak, weights = map(int, done.stdout.split())
    assert weights > 70e6
    assert peak < 1.1 * weights + largest + 20e6
