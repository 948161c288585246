"""Checks before the first step that the run can end well; and failures at the end, which leave the trained model."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alignlab.config.model import LoraSettings
from alignlab.config.trainers import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from alignlab.errors import CheckpointError, ConfigError, DiskError
from alignlab.evaluation import report
from alignlab.loop import ending_check as ending
from alignlab.models.hub.checkpoints import save_model
from alignlab.trainers.dpo import DPOTrainer
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.ppo import PPOTrainer
from alignlab.trainers.reward import RewardTrainer
from alignlab.trainers.sft import SFTTrainer
from tests.settings import merged
from tests.trainers.conftest import even_ids

Make = Callable[..., Any]
ROWS = [{"prompt": f"ab{i}", "completion": f"ba{i}"} for i in range(4)]
PAIRS = [{"prompt": f"ab{i}", "chosen": f"ba{i}", "rejected": "b"} for i in range(4)]


@pytest.fixture
def sft(tmp_path: Path, make_model: Make, tokenizer: Any) -> Make:
    def make(model: Any = None, *, callbacks: Any = (), used_tokenizer: Any = tokenizer, **changes: Any) -> SFTTrainer:
        base: dict[str, Any] = {"output_dir": tmp_path / "run", "num_steps": 2, "num_sequences": 2, "trackers": ()}
        return SFTTrainer(
            model or make_model(), SFTConfig(**merged(base, changes)), ROWS, tokenizer=used_tokenizer,
            callbacks=callbacks
        )

    return make


def check_refused_before_the_first_step(trainer: Any, kind: type[Exception], message: str) -> None:
    steps: list[int] = []
    trainer.callbacks = (lambda _, step, metrics: steps.append(step),)
    with pytest.raises(kind, match=message):
        trainer.train()
    assert steps == [] and not trainer.config.output_dir.exists(), "the run has not started"


def test_generation_defaults_with_a_temperature_alone_are_saved(sft: Make, make_model: Make) -> None:
    model = make_model()
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6
    path = sft(model).train().model_path
    saved = AutoModelForCausalLM.from_pretrained(path).generation_config
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)
    assert AutoTokenizer.from_pretrained(path).eos_token is not None


def hold_an_object(model: Any) -> None:
    model.config.rope_parameters["note"] = object()


def register_a_buffer(model: Any) -> None:
    model.register_buffer("running_mean", torch.zeros(2))


def share_weights(model: Any) -> None:
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight


def wrong_defaults(model: Any) -> None:
    model.generation_config.num_return_sequences = 3


@pytest.mark.parametrize("spoil", [hold_an_object, register_a_buffer, share_weights, wrong_defaults])
def test_model_that_cannot_be_saved_is_not_trained(spoil: Any, sft: Make, make_model: Make) -> None:
    model = make_model()
    spoil(model)
    check_refused_before_the_first_step(sft(model), CheckpointError, "cannot be (saved|written)")


def test_tokenizer_that_cannot_be_saved_or_read_back_is_refused(
    sft: Make, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    unsaveable = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    unsaveable.init_kwargs["note"] = object()
    check_refused_before_the_first_step(sft(used_tokenizer=unsaveable), CheckpointError, "JSON")

    class WritesNothing(type(tokenizer)):  # type: ignore[misc]  # a class that a test makes
        def save_pretrained(self, folder: Any, **options: Any) -> tuple[str, ...]:
            return ()  # like a tokenizer whose vocabulary file is gone

    writes_nothing = WritesNothing(tokenizer_object=tokenizer.backend_tokenizer, eos_token=tokenizer.eos_token)
    check_refused_before_the_first_step(sft(used_tokenizer=writes_nothing), CheckpointError, "cannot be read back")


def test_reward_model_that_cannot_be_saved_is_not_trained(
    make_model: Make, tokenizer: Any, tmp_path: Path
) -> None:
    config = RewardConfig(output_dir=tmp_path / "run", num_steps=1, num_pairs=2, trackers=())
    model = make_model()
    trainer = RewardTrainer(model, config, PAIRS, tokenizer=tokenizer)
    model.config.rope_parameters["note"] = object()
    check_refused_before_the_first_step(trainer, CheckpointError, "cannot be saved")
    adapted = RewardTrainer(make_model(), config, PAIRS, tokenizer=tokenizer, peft_config=LoraSettings(rank=2))
    adapted.learner.model.peft_config["default"].revision = object()
    check_refused_before_the_first_step(adapted, CheckpointError, "adapter default cannot be saved")


def test_missing_matplotlib_is_refused(sft: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    check_refused_before_the_first_step(sft(), ConfigError, "pip install matplotlib")


class Usage(NamedTuple):
    free: int


def test_disk_without_room_for_checkpoints_and_model_is_refused(sft: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = sft(num_steps=9, checkpoints={"every_steps": 1, "keep": 2})
    weights = sum(p.numel() * 4 for p in trainer.learner.model.parameters())
    needed = 3 * 3 * weights + weights  # two checkpoints stay while a third is written, and then the model
    assert ending.needed_bytes(trainer.config, trainer.learner.model, 3 * weights) == needed
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed - 1))
    check_refused_before_the_first_step(trainer, ConfigError, "GiB for 3 checkpoints")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(needed))
    trainer.check_ending()


def test_resumed_run_needs_no_room_for_its_present_checkpoints(sft: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    sft().train()
    trainer = sft(num_steps=4)
    weights = sum(p.numel() * 4 for p in trainer.learner.model.parameters())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(weights // 2))
    with pytest.raises(ConfigError, match="GiB free"):
        trainer.train(resume=True)  # the model is written beside the earlier one
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(weights + weights // 10))
    assert trainer.train(resume=True).num_steps == 4


def test_generation_defaults_with_another_end_token_are_warned_of(
    sft: Make, make_model: Make, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    assert model.config.eos_token_id == tokenizer.eos_token_id
    model.generation_config.eos_token_id = [5]
    sft(model).check_ending()
    assert "the model's configs name 5" in caplog.text


def test_adapter_needs_room_for_its_own_weights_alone(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    config = SFTConfig(output_dir=tmp_path / "run", num_steps=2, num_sequences=2, trackers=())
    trainer = SFTTrainer(make_model(), config, ROWS, tokenizer=tokenizer, peft_config=LoraSettings(rank=2))
    trained = sum(p.numel() * 4 for p in trainer.learner.model.parameters() if p.requires_grad)
    assert ending.needed_bytes(config, trainer.learner.model, 3 * trained) == 4 * trained


@pytest.mark.parametrize("saved", ["adapter", "model"])
def test_a_full_disk_under_the_trial_is_no_fault_of_the_model(
    saved: str, make_model: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(LoraConfig if saved == "adapter" else PreTrainedModel, "save_pretrained", full)
    config = SFTConfig(output_dir=tmp_path / "run", num_steps=2, num_sequences=2, trackers=())
    lora = LoraSettings(rank=2) if saved == "adapter" else None
    trainer = SFTTrainer(make_model(), config, ROWS, tokenizer=tokenizer, peft_config=lora)
    with pytest.raises(DiskError, match=r"what the end of the run saves cannot be written to /.*: File too large"):
        trainer.check_ending()


def test_adapter_on_a_base_without_a_name_is_warned_of(
    make_model: Make, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = SFTConfig(output_dir=tmp_path / "run", num_steps=1, num_sequences=2, trackers=())
    SFTTrainer(make_model(), config, ROWS, tokenizer=tokenizer, peft_config=LoraSettings(rank=2)).train()
    assert "the saved adapter will not name its base" in caplog.text


def test_failing_evaluation_at_the_end_leaves_the_trained_model(
    make_model: Make, make_config: Make, rows: Any, tokenizer: Any
) -> None:
    trainer = GRPOTrainer(
        make_model(), even_ids, make_config(num_steps=1), rows, eval_dataset=rows[:2], tokenizer=tokenizer
    )
    evaluate = trainer.evaluate

    def failing() -> Any:
        if trainer.step == 0:
            return evaluate()
        raise RuntimeError("the scorer is gone")

    trainer.evaluate = failing  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="scorer is gone"):
        trainer.train()
    folder = trainer.config.output_dir
    saved = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    weights = trainer.learner.model.state_dict()
    assert torch.equal(saved["model.norm.weight"], weights["model.norm.weight"])
    trainer.evaluate = evaluate  # type: ignore[method-assign]
    assert trainer.train(resume=True).after is not None


@pytest.mark.parametrize("at", [1, 2])
def test_failing_callback_loses_no_step(at: int, sft: Make) -> None:
    def failing(trainer: Any, step: int, metrics: Mapping[str, float]) -> None:
        if step == at:
            raise ValueError("no room in the inbox")

    trainer = sft(num_steps=3, callbacks=(failing,))
    with pytest.raises(ValueError, match="inbox"):
        trainer.train()
    seen: list[int] = []
    resumed = sft(num_steps=3, callbacks=(lambda _, step, metrics: seen.append(step),))
    result = resumed.train(resume=True)
    assert seen == list(range(at + 1, 4)) and result.num_steps == 3


def test_run_resumed_after_a_failed_callback_equals_one_without_failure(
    sft: Make, tmp_path: Path, make_model: Make
) -> None:
    def failing(trainer: Any, step: int, metrics: Mapping[str, float]) -> None:
        torch.rand(5)  # a callback that draws before it fails
        raise ValueError("inbox")

    with pytest.raises(ValueError, match="inbox"):
        sft(callbacks=(failing,)).train()
    resumed = sft()
    resumed.train(resume=True)
    straight = sft(output_dir=tmp_path / "straight")
    straight.train()
    weights, expected = (trainer.learner.model.state_dict() for trainer in (resumed, straight))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_curves_that_cannot_be_drawn_do_not_fail_the_run(
    sft: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*words: Any, **options: Any) -> bool:
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "plot_curves", failing)
    result = sft().train()
    assert json.loads((result.folder / "report.json").read_text())["num_steps"] == 2
    assert "the curves could not be drawn (RuntimeError: no font)" in caplog.text


def test_every_kind_of_trainer_checks_its_ending(
    make_model: Make, make_config: Make, rows: Any, tokenizer: Any, tmp_path: Path
) -> None:
    ppo = PPOConfig(output_dir=tmp_path / "ppo", num_steps=1, num_prompts=2, group_size=2, critic={"form": "model"})
    common = {"tokenizer": tokenizer}
    for trainer in (
        GRPOTrainer(make_model(), even_ids, make_config(), rows, **common),
        PPOTrainer(make_model(), even_ids, ppo, rows, **common),
        DPOTrainer(make_model(), DPOConfig(output_dir=tmp_path / "dpo", num_pairs=2), PAIRS, **common),
    ):
        trainer.check_ending()
        trainer.learner.model.config.rope_parameters["note"] = object()
        with pytest.raises(CheckpointError, match="cannot be saved"):
            trainer.check_ending()


def test_saved_model_folder_can_be_trained_again(sft: Make, make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    save_model(make_model(), tmp_path / "first")
    tokenizer.save_pretrained(tmp_path / "first")
    assert sft(str(tmp_path / "first")).train().num_steps == 2
