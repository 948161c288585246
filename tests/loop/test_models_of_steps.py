"""`checkpoints.with_model`: beside each checkpoint stands the model of its step, for other programs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignlab.config.model import LoraSettings
from alignlab.config.trainers import SFTConfig
from alignlab.files.manifest import MODEL_MANIFEST, find_damage
from alignlab.loop.ending_check import needed_bytes
from alignlab.models.hub.checkpoints import load_model
from alignlab.trainers.sft import SFTTrainer
from tests.settings import merged

Make = Callable[..., Any]
EXAMPLES = [{"prompt": f"ab{i}", "completion": f"ba{i}"} for i in range(4)]


@pytest.fixture
def sft(make_model: Make, tokenizer: Any, tmp_path: Path) -> Make:
    def make(peft_config: LoraSettings | None = None, **changes: Any) -> SFTTrainer:
        base: dict[str, Any] = {
            "output_dir": tmp_path / "run", "num_steps": 3, "num_sequences": 2, "trackers": (),
            "checkpoints": {"every_steps": 1, "keep": 2, "with_model": True},
        }
        config = SFTConfig(**merged(base, changes))
        return SFTTrainer(make_model(), config, EXAMPLES, tokenizer=tokenizer, peft_config=peft_config)

    return make


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_each_checkpoint_has_its_model(sft: Make, tmp_path: Path) -> None:
    sft().train()
    run = tmp_path / "run"
    assert names(run / "models") == names(run / "checkpoints") == ["step-00000002", "step-00000003"]
    for step in names(run / "models"):
        folder = run / "models" / step
        assert find_damage(folder, MODEL_MANIFEST) is None
        policy = load_file(run / "checkpoints" / step / "policy.safetensors")
        saved = {name.removeprefix("model."): weight for name, weight in policy.items()}
        weights = load_model(str(folder), dtype=torch.float32).state_dict()
        assert saved and all(torch.equal(weights[name], weight) for name, weight in saved.items())
        assert AutoTokenizer.from_pretrained(folder).get_vocab()
    second, third = (load_model(str(run / "models" / step), dtype=torch.float32) for step in names(run / "models"))
    assert any(not torch.equal(a, b) for a, b in zip(second.parameters(), third.parameters(), strict=True))


def test_an_adapter_is_written_alone(sft: Make, tmp_path: Path) -> None:
    sft(LoraSettings(rank=2)).train()
    assert "adapter_model.safetensors" in names(tmp_path / "run" / "models" / "step-00000003")
    assert not list((tmp_path / "run" / "models").rglob("model.safetensors"))


def test_a_step_that_a_failing_run_has_kept_gets_its_model_when_the_run_goes_on(sft: Make, tmp_path: Path) -> None:
    class Failure(Exception):
        pass

    def fails(trainer: Any, step: int, metrics: Any) -> None:
        if step == 2:
            raise Failure

    trainer = sft(checkpoints={"every_steps": 1, "keep": 9, "with_model": True})
    trainer.callbacks = (fails,)
    with pytest.raises(Failure):
        trainer.train()
    run = tmp_path / "run"
    assert names(run / "checkpoints") == ["step-00000001", "step-00000002"]
    assert names(run / "models") == ["step-00000001"]
    sft(checkpoints={"every_steps": 1, "keep": 9, "with_model": True}).train(resume=True)
    assert names(run / "models") == names(run / "checkpoints") == [f"step-{step:08d}" for step in (1, 2, 3)]


def test_without_the_setting_there_are_none(sft: Make, tmp_path: Path) -> None:
    sft(checkpoints={"every_steps": 1, "with_model": False}).train()
    assert not (tmp_path / "run" / "models").exists()


def test_their_room_on_the_disk_is_reckoned_with(sft: Make) -> None:
    trainer = sft(num_steps=9)
    weights = sum(p.numel() * 4 for p in trainer.learner.model.parameters())
    # Two checkpoints stay while a third is written, each beside its model; and the model of the end.
    assert needed_bytes(trainer.config, trainer.learner.model, 3 * weights) == 3 * 3 * weights + 3 * weights + weights


def test_other_programs_load_it(sft: Make, tmp_path: Path) -> None:
    sft().train()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "models" / "step-00000003")
    assert sum(parameter.numel() for parameter in model.parameters())
