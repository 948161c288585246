import json
import os
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alignlab.config.trainers import SFTConfig
from alignlab.errors import CheckpointError
from alignlab.loop.optim import load_schedule_state, make_optimizer, make_schedule, schedule_state
from alignlab.runs import checkpoint as module
from alignlab.runs.checkpoint import (
    Checkpoint,
    checkpoint_folders,
    load_latest,
    load_optimizer_tensors,
    optimizer_tensors,
    save_checkpoint,
)
from alignlab.runs.random_state import packed, random_state, restore_random_state, seed_anew, unpacked

CONFIG = SFTConfig(
    optim={"learning_rate": 0.05, "warmup_steps": 2, "schedule": "cosine", "weight_decay": 0.1}, num_steps=10
)


class Training:
    """A few steps of noisy regression with dropout: everything that a checkpoint has to bring back."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(0.3), nn.Linear(8, 1))
        self.optimizer = make_optimizer(self.model, CONFIG)
        self.schedule = make_schedule(self.optimizer, CONFIG, CONFIG.num_steps, 1)

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            inputs = torch.randn(16, 4)
            target = inputs.sum(-1, keepdim=True) + float(np.random.randn())
            loss = ((self.model(inputs) - target) ** 2).mean()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def save(self, folder: Path, step: int, keep: int = 2) -> Path:
        return save_checkpoint(
            folder,
            step,
            tensors={
                "model": self.model.state_dict(),
                "optimizer": optimizer_tensors(self.optimizer, self.model.named_parameters()),
            },
            state={"schedule": schedule_state(self.schedule), "note": "é", "fraction": 0.1},
            keep=keep,
        )

    def load(self, saved: Checkpoint) -> None:
        self.model.load_state_dict(saved.tensors["model"])
        load_optimizer_tensors(self.optimizer, self.model.named_parameters(), saved.tensors["optimizer"])
        load_schedule_state(self.schedule, saved.state["schedule"])
        restore_random_state(saved.random)


def flip_byte(path: Path, position: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def save_number(folder: Path, step: int, *, keep: int = 9, **options: Any) -> Path:
    tensors = {"model": {"number": torch.tensor([float(step)])}}
    return save_checkpoint(folder, step, tensors=tensors, state={"step": step}, keep=keep, **options)


def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    whole = Training(seed=0)
    whole.run(4)
    whole.save(tmp_path, 4)
    expected = whole.run(6)

    resumed = Training(seed=99)
    resumed.run(1)
    saved = load_latest(tmp_path)
    assert saved is not None and saved.step == 4
    assert saved.state["note"] == "é" and saved.state["fraction"] == 0.1
    resumed.load(saved)
    assert resumed.run(6) == expected
    for name, value in whole.weights().items():
        assert torch.equal(resumed.weights()[name], value), name
    assert resumed.schedule.get_last_lr() == whole.schedule.get_last_lr()


def test_saving_does_not_disturb_the_run(tmp_path: Path) -> None:
    expected = Training(seed=5).run(6)
    saving = Training(seed=5)
    losses = saving.run(3)
    saving.save(tmp_path, 3)
    assert losses + saving.run(3) == expected


def test_empty_folder_has_no_checkpoint(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "absent") is None


def test_all_files_are_safetensors_or_json(tmp_path: Path) -> None:
    training = Training(seed=0)
    training.run(1)
    path = training.save(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json",
        "model.safetensors",
        "optimizer.safetensors",
        "random-0.json",
        "random-0.safetensors",
        "state.json",
    ]


def test_dtypes_shapes_and_shared_storage_survive(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    tensors = {
        "half": torch.tensor([1.0, float("nan"), -0.0], dtype=torch.bfloat16),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "shared": shared,
        "transposed": shared.T,
        "tied": shared,
    }
    save_checkpoint(tmp_path, 1, tensors={"model": tensors, "empty": {}}, state={}, keep=1)
    saved = load_latest(tmp_path)
    assert saved is not None and saved.tensors["empty"] == {}
    for name, value in tensors.items():
        loaded = saved.tensors["model"][name]
        assert loaded.dtype == value.dtype and loaded.shape == value.shape, name
        torch.testing.assert_close(loaded, value, rtol=0, atol=0, equal_nan=True)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save_number(tmp_path, step, keep=2)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-00000003", "step-00000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000010"]


def test_a_saved_step_is_not_written_again(tmp_path: Path) -> None:
    path = save_number(tmp_path, 1)
    before = (path / "manifest.json").read_bytes()
    again = save_checkpoint(tmp_path, 1, tensors={"model": {}}, state={"step": 7}, keep=1)
    assert again == path and (path / "manifest.json").read_bytes() == before


def test_crash_before_the_rename_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_number(tmp_path, 1, keep=1)

    def crash(source: object, target: object) -> None:
        raise OSError("power cut")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="power cut"):
        save_number(tmp_path, 2, keep=1)
    monkeypatch.undo()
    saved = load_latest(tmp_path)
    assert saved is not None and saved.step == 1 and saved.tensors["model"]["number"].item() == 1.0

    save_number(tmp_path, 2, keep=1)
    saved = load_latest(tmp_path)
    assert saved is not None and saved.step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"], "what the crash left is cleared away"


def test_crash_in_the_middle_of_writing_leaves_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_number(tmp_path, 1, keep=1)
    monkeypatch.setattr(module, "_write_json", lambda path, value: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_number(tmp_path, 2, keep=1)
    saved = load_latest(tmp_path)
    assert saved is not None and saved.step == 1


def test_crash_while_removing_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_number(tmp_path, 1, keep=1)
    real = module.shutil.rmtree

    def crash(path: Path, **options: object) -> None:
        if str(path).endswith(".removed"):
            raise OSError("power cut")
        real(path, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module.shutil, "rmtree", crash)
    with pytest.raises(OSError, match="power cut"):
        save_number(tmp_path, 2, keep=1)
    assert [path.name for path in checkpoint_folders(tmp_path)] == ["step-00000002"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "random-0.safetensors", "manifest.json"])
def test_a_flipped_byte_is_detected_and_the_intact_checkpoint_named(tmp_path: Path, name: str) -> None:
    old = save_number(tmp_path, 1)
    new = save_number(tmp_path, 2)
    flip_byte(new / name)
    with pytest.raises(CheckpointError) as caught:
        load_latest(tmp_path)
    message = str(caught.value)
    assert str(new / name) in message
    assert f"remove the folder {new} to resume from {old}, which is intact" in message


def test_a_changed_step_in_the_manifest_is_detected(tmp_path: Path) -> None:
    path = save_number(tmp_path, 2) / "manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
        load_latest(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "shorter"])
def test_a_missing_or_truncated_file_is_detected(tmp_path: Path, damage: str) -> None:
    file = save_number(tmp_path, 1) / "model.safetensors"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model\.safetensors (is missing|has \d+ bytes).*no other checkpoint"):
        load_latest(tmp_path)


def test_the_intact_checkpoint_named_is_really_intact(tmp_path: Path) -> None:
    intact, damaged, newest = (save_number(tmp_path, step) for step in (1, 2, 3))
    flip_byte(damaged / "model.safetensors")
    (newest / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=f"resume from {intact}, which is intact"):
        load_latest(tmp_path)


def test_each_rank_gets_its_own_random_state_back(tmp_path: Path) -> None:
    states, draws = [], []
    for rank in (0, 1):
        torch.manual_seed(rank)
        states.append(unpacked(packed(random_state())))  # as a rank sends it
        draws.append((torch.rand(3), np.random.rand(3), random.random()))
    save_number(tmp_path, 5, random=states)
    for rank in (0, 1):
        saved = load_latest(tmp_path, rank=rank, world_size=2)
        assert saved is not None
        restore_random_state(saved.random)
        again = (torch.rand(3), np.random.rand(3), random.random())
        assert torch.equal(again[0], draws[rank][0])
        assert (again[1] == draws[rank][1]).all() and again[2] == draws[rank][2]
        assert saved.tensors.keys() == {"model"}


def test_a_copy_of_a_checkpoint_under_another_name_is_ignored(tmp_path: Path) -> None:
    first, second = save_number(tmp_path, 1), save_number(tmp_path, 2)
    for name in ("step-00000009.bak", "step-9", "step-000000090", "old-step-00000009"):
        shutil.copytree(second, tmp_path / name)
    saved = load_latest(tmp_path)
    assert saved is not None and saved.path == second
    save_number(tmp_path, 3, keep=1)
    assert not first.exists() and (tmp_path / "step-00000009.bak").is_dir(), "what others made is left alone"


@pytest.mark.parametrize("how", ["copied", "renamed", "swapped"])
def test_a_checkpoint_under_the_name_of_another_step_is_refused(tmp_path: Path, how: str) -> None:
    first, second = save_number(tmp_path, 1), save_number(tmp_path, 2)
    newest = tmp_path / "step-00000003"
    if how == "copied":
        shutil.copytree(first, newest)
    elif how == "renamed":
        first.rename(newest)
    else:
        first.rename(tmp_path / "other")
        second.rename(first)
        (tmp_path / "other").rename(second)
        newest = second
    with pytest.raises(CheckpointError, match=r"holds the checkpoint of step \d: it was renamed, or is a") as caught:
        load_latest(tmp_path)
    way_on = "put it back as it was" if how == "swapped" else f"remove the folder {newest}"
    assert way_on in str(caught.value)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    own = save_number(tmp_path, 1, run_id="a" * 32)
    save_number(tmp_path, 2, run_id="b" * 32)
    with pytest.raises(CheckpointError, match=rf"is of another run \(b+\) .* to resume from {own}, which is intact"):
        load_latest(tmp_path, run_id="a" * 32)
    save_number(tmp_path, 2, run_id="a" * 32)
    saved = load_latest(tmp_path, run_id="a" * 32)
    assert saved is not None and saved.step == 2, "the other run's checkpoint is replaced"


def test_another_number_of_ranks_has_no_random_states(tmp_path: Path) -> None:
    save_number(tmp_path, 1)
    saved = load_latest(tmp_path, rank=1, world_size=2)
    assert saved is not None and saved.random is None and saved.num_ranks == 1
    assert saved.tensors.keys() == {"model"}


def test_generators_seeded_anew_depend_on_the_text_alone() -> None:
    draws = []
    for text in ("7/3/0", "7/3/0", "7/3/1"):
        seed_anew(text)
        draws.append((float(torch.rand(())), float(np.random.rand()), random.random()))
    assert draws[0] == draws[1] and not set(draws[0]) & set(draws[2])


def test_optimizer_state_of_another_model_is_refused() -> None:
    training = Training(seed=0)
    training.run(1)
    tensors = optimizer_tensors(training.optimizer, training.model.named_parameters())
    other = nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.Dropout(0.3), nn.Linear(9, 1))
    with pytest.raises(CheckpointError, match=r"0\.weight in the checkpoint has shape \(8, 4\)"):
        load_optimizer_tensors(make_optimizer(other, CONFIG), other.named_parameters(), tensors)
    named = {f"model.{name}": p for name, p in other.named_parameters()}
    with pytest.raises(CheckpointError, match="must belong to trained parameters"):
        load_optimizer_tensors(make_optimizer(other, CONFIG), named, tensors)


def test_parameters_without_a_gradient_have_no_optimizer_state() -> None:
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    optimizer = make_optimizer(model, CONFIG)
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    tensors = optimizer_tensors(optimizer, model.named_parameters())
    assert {name.split(".", 1)[1] for name in tensors} == {"0.weight", "0.bias"}
    load_optimizer_tensors(optimizer, model.named_parameters(), tensors)
    assert len(optimizer.state) == 2


def test_manifest_lists_every_other_file(tmp_path: Path) -> None:
    path = save_number(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"].keys() == {p.name for p in path.iterdir()} - {"manifest.json"}
    assert (manifest["step"], manifest["world_size"]) == (1, 1)


def test_checkpoints_that_may_not_be_read_are_neither_missing_nor_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "step-00000001").mkdir()

    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        patch.setattr(os, "listdir", refuse)
        with pytest.raises(PermissionError):
            load_latest(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(PermissionError):
            load_latest(tmp_path)
    assert load_latest(tmp_path / "none") is None
