"""Folders of adapters that are damaged, or of another model."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from alignlab.cli.policy import put_adapter
from alignlab.config.model import LoraSettings
from alignlab.errors import CheckpointError
from alignlab.models.adapters import add_lora
from alignlab.models.hub.checkpoints import check_checkpoint, load_model, save_model
from tests.models.conftest import SIZES


def save_base(folder, **changes) -> str:
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES | changes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def adapter(tmp_path):
    """A folder with an adapter on the model beside it."""
    save_model(add_lora(load_model(save_base(tmp_path / "base"), dtype=torch.float32), LoraSettings(rank=4)),
               tmp_path / "adapter")
    return tmp_path / "adapter"


def change_config(folder, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def change_tensors(folder, change) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def test_an_intact_adapter_loads(adapter):
    check_checkpoint(str(adapter))
    load_model(str(adapter), dtype=torch.float32)


DAMAGES = {
    "must be a model.*merge that adapter first": lambda a: (
        shutil.copytree(a, a.parent / "other"), change_config(a, base_model_name_or_path=str(a.parent / "other"))
    ),
    "is the adapter itself, and must be a model": lambda a: change_config(a, base_model_name_or_path=str(a)),
    "does not name its base": lambda a: change_config(a, base_model_name_or_path=None),
    "the base of the adapter .*there is no folder": lambda a: shutil.rmtree(a.parent / "base"),
    "task_type TOKEN_CLS, and must have CAUSAL_LM": lambda a: change_config(a, task_type="TOKEN_CLS"),
    "is a reward model": lambda a: change_config(a, task_type="SEQ_CLS"),
    "adapter_config.json cannot be read": lambda a: (a / "adapter_config.json").write_text("{"),
    "adapter_config.json cannot be read.*one object": lambda a: (a / "adapter_config.json").write_text("[]"),
    "adapter_config.json cannot be read: ": lambda a: change_config(a, peft_type="NO_SUCH"),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damage_of_the_config_is_named_before_weights_are_read(adapter, message):
    DAMAGES[message](adapter)
    for use in (check_checkpoint, lambda name: load_model(name, dtype=torch.float32)):
        with pytest.raises(CheckpointError, match=f"(?s){message}"):
            use(str(adapter))


def first_layer(tensors):
    return {key: tensor for key, tensor in tensors.items() if ".layers.0." in key}


def deeper(tensors):
    return tensors | {key.replace(".layers.0.", ".layers.7."): t.clone() for key, t in first_layer(tensors).items()}


TENSORS = {
    "Found missing adapter keys": first_layer,
    "Found missing adapter keys.*": lambda tensors: {"other": torch.zeros(1)},
    "layers.7.* is in the file, and in no layer": deeper,
    "size mismatch": lambda tensors: {key: tensor[:, :-1].contiguous() for key, tensor in tensors.items()},
}


@pytest.mark.parametrize("message", TENSORS)
def test_tensors_that_do_not_fit_are_named(adapter, message):
    change_tensors(adapter, TENSORS[message])
    with pytest.raises(CheckpointError, match=f"(?s)does not fit .*base: .*{message}.*give the model that it was"):
        load_model(str(adapter), dtype=torch.float32)


@pytest.mark.parametrize("file_is", ["cut", "absent", "empty"])
def test_a_damaged_file_of_tensors_is_named(adapter, file_is):
    file = adapter / "adapter_model.safetensors"
    if file_is == "absent":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: 100 if file_is == "cut" else 0])
    with pytest.raises(CheckpointError):
        check_checkpoint(str(adapter))
    message = "has no adapter_model.safetensors" if file_is == "absent" else "adapter_model.safetensors is damaged"
    with pytest.raises(CheckpointError, match=message):
        load_model(str(adapter), dtype=torch.float32)


def test_an_adapter_of_a_deeper_or_narrower_model_is_refused(adapter, tmp_path):
    for number, changes in enumerate(({"num_hidden_layers": 1}, {"intermediate_size": 64})):
        other = load_model(save_base(tmp_path / f"other{number}", **changes), dtype=torch.float32)
        with pytest.raises(CheckpointError, match=rf"does not fit .*other{number}: "):
            put_adapter(other, str(adapter))


def test_an_adapter_on_an_adapter_is_refused(adapter):
    model = load_model(str(adapter), dtype=torch.float32)
    with pytest.raises(CheckpointError, match="is an adapter itself; give the base of both"):
        put_adapter(model, str(adapter))


def test_saved_modules_and_trained_tokens_are_accepted(tmp_path):
    base = load_model(save_base(tmp_path / "base"), dtype=torch.float32)
    targets = ["q_proj", "embed_tokens"]
    config = LoraConfig(
        task_type="CAUSAL_LM", r=2, target_modules=targets, modules_to_save=["lm_head"], use_dora=True
    )
    model = get_peft_model(base, config)
    save_model(model, tmp_path / "adapter")
    loaded = load_model(str(tmp_path / "adapter"), dtype=torch.float32)
    tokens = torch.tensor([[3, 9, 4]])
    torch.testing.assert_close(loaded(tokens).logits, model.eval()(tokens).logits)
