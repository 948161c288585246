"""The average of the weights: by hand, in evaluations and in the run's model, in checkpoints and after failures."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from alignlab.config.averaging import EMASettings
from alignlab.config.model import LoraSettings
from alignlab.config.run import RunConfig
from alignlab.config.trainers import GRPOConfig, RLAIFConfig, SFTConfig
from alignlab.errors import CheckpointError, ConfigError
from alignlab.loop.averaging import WeightAverage
from alignlab.loop.optim import make_optimizer
from alignlab.trainers.sft import SFTTrainer
from tests.settings import merged
from tests.trainers.steps import weights_of

Make = Callable[..., Any]
Tensors = dict[str, torch.Tensor]
ROWS = [{"prompt": f"ab{i}", "completion": "ab" * (1 + i % 3)} for i in range(8)]


def test_three_updates_by_hand() -> None:
    model = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    average = WeightAverage(dict(model.named_parameters()), optimizer, EMASettings(decay=0.75))
    for _ in range(3):  # 8 -> 4 -> 0 -> -4
        model.weight.grad = torch.full((1, 1), 4.0)
        optimizer.step()
    # 8, 0.75 * 8 + 0.25 * 4 = 7, 0.75 * 7 = 5.25, 0.75 * 5.25 - 0.25 * 4
    assert average.tensors["weight"].item() == 2.9375


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_average_is_at_least_float32_and_follows_the_exact_copies(dtype: torch.dtype) -> None:
    """Of bfloat16 weights: updates that vanish in their rounding are in the average."""
    torch.manual_seed(0)
    model = nn.Linear(4, 4, bias=False).to(dtype)
    optimizer = make_optimizer(model, SFTConfig(optim={"learning_rate": 1e-4}))
    average = WeightAverage(dict(model.named_parameters()), optimizer, EMASettings(decay=0.5))
    expected = model.weight.detach().to(average.tensors["weight"].dtype, copy=True)
    for _ in range(5):
        model.weight.grad = torch.ones(4, 4, dtype=torch.promote_types(dtype, torch.float32))
        optimizer.step()
        exact = optimizer.state[model.weight].get("master", model.weight)
        expected = 0.5 * expected + 0.5 * exact.detach()
    [tensor] = average.tensors.values()
    assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    assert dtype != torch.bfloat16 or not torch.equal(tensor, tensor.bfloat16().float())


def test_weights_are_back_to_the_bit_after_they_were_replaced_and_after_an_error() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 4).bfloat16()
    optimizer = make_optimizer(model, SFTConfig(optim={"learning_rate": 1e-1}))
    average = WeightAverage(dict(model.named_parameters()), optimizer, EMASettings(decay=0.9))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter, dtype=torch.float32)
    optimizer.step()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    versions = [parameter._version for parameter in model.parameters()]
    with pytest.raises(ZeroDivisionError), average.in_place():
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, average.tensors[name].bfloat16())
            assert not torch.equal(parameter, before[name])
            assert torch.equal(average.set_aside[name], before[name])
        assert all(p._version > version for p, version in zip(model.parameters(), versions, strict=True))
        raise ZeroDivisionError
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert average.set_aside == {}


@pytest.fixture
def make(make_model: Make, tokenizer: Any, tmp_path: Path) -> Make:
    def make(folder: str = "run", *, lora: Any = None, callbacks: Any = (), dtype: torch.dtype = torch.float32,
             **changes: Any) -> SFTTrainer:
        base: dict[str, Any] = {
            "num_steps": 4, "num_sequences": 4, "optim": {"learning_rate": 1e-2}, "trackers": (),
            "eval_every_steps": 1, "ema": {"decay": 0.5},
        }
        config = SFTConfig(output_dir=tmp_path / folder, **merged(base, changes))
        return SFTTrainer(
            make_model().to(dtype), config, ROWS, eval_dataset=ROWS[:3], tokenizer=tokenizer, peft_config=lora,
            callbacks=callbacks,
        )

    return make


def copied(tensors: Any) -> Tensors:
    return {name: tensor.detach().float().clone() for name, tensor in tensors.items()}


def averages_of(history: list[Tensors], decay: float) -> Tensors:
    """Return the average of the weights at the start and after each step."""
    average = history[0]
    for weights in history[1:]:
        average = {name: decay * average[name] + (1 - decay) * weight for name, weight in weights.items()}
    return average


def saved_weights(folder: Path) -> Tensors:
    [path] = [path for name in ("model", "adapter") for path in (folder / name).glob("*.safetensors")]
    return load_file(path)


def assert_saved(folder: Path, weights: Tensors, dtype: torch.dtype = torch.float32) -> None:
    saved = saved_weights(folder)
    assert saved
    for name, tensor in saved.items():
        [own] = [key for key in weights if key.removeprefix("model.").replace(".default", "") == name]
        torch.testing.assert_close(tensor, weights[own].to(tensor.dtype), rtol=1e-6, atol=1e-7, msg=name)
        assert tensor.dtype == dtype


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "time" and "_s" not in n} for line in lines]


@pytest.mark.parametrize("export", [True, False], ids=["average", "last weights"])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all weights", "adapter"])
def test_the_model_of_a_run_is_the_average_if_the_settings_say_so(
    lora: Any, export: bool, make: Make, tmp_path: Path
) -> None:
    history: list[Tensors] = []
    trainer = make(
        lora=lora, callbacks=(lambda trainer, *_: history.append(copied(trainer.learner.trained)),),
        ema={"export": export}, checkpoints={"with_model": True, "every_steps": 4},
    )
    history.append(copied(trainer.learner.trained))
    result = trainer.train()
    average = averages_of(history, 0.5)
    assert trainer.learner.average.tensors.keys() == average.keys()
    for name, tensor in trainer.learner.average.tensors.items():
        torch.testing.assert_close(tensor, average[name], rtol=1e-6, atol=1e-7)
    assert_saved(tmp_path / "run", average if export else history[-1])
    [beside] = (tmp_path / "run" / "models" / "step-00000004").glob("*.safetensors")
    saved, of_step = saved_weights(tmp_path / "run"), load_file(beside)
    assert all(torch.equal(saved[name], of_step[name]) for name in saved)
    assert all(torch.equal(weight.float(), history[-1][name]) for name, weight in trainer.learner.trained.items())
    model = make("again", lora=lora)
    with torch.no_grad():
        for name, parameter in model.learner.trained.items():
            parameter.copy_((average if export else history[-1])[name])
    assert result.after.loss == pytest.approx(model.evaluate().loss, rel=1e-5)


@pytest.mark.parametrize("evaluate", [True, False])
def test_evaluations_between_steps_are_of_what_the_settings_say(evaluate: bool, make: Make, tmp_path: Path) -> None:
    history: list[Tensors] = []
    trainer = make(
        callbacks=(lambda trainer, *_: history.append(copied(trainer.learner.trained)),), ema={"evaluate": evaluate}
    )
    history.append(copied(trainer.learner.trained))
    trainer.train()
    measured = [line["eval/loss"] for line in metrics_of(tmp_path / "run") if "eval/loss" in line]
    other = make("other")
    for step in (1, 2, 3):
        weights = averages_of(history[: step + 1], 0.5) if evaluate else history[step]
        with torch.no_grad():
            for name, parameter in other.learner.trained.items():
                parameter.copy_(weights[name])
        assert measured[step] == pytest.approx(other.evaluate().loss, rel=1e-5)


def test_an_average_changes_nothing_of_what_is_trained(make: Make) -> None:
    ends = []
    for folder, changes in (("with", {}), ("without", {"ema": None})):
        trainer = make(folder, **changes)
        trainer.train()
        ends.append(weights_of(trainer))
    assert all(torch.equal(weight, ends[1][name]) for name, weight in ends[0].items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all weights", "adapter"])
def test_resumed_run_equals_an_uninterrupted_run(lora: Any, dtype: torch.dtype, make: Make, tmp_path: Path) -> None:
    def stop(trainer: Any, step: int, metrics: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = make("whole", lora=lora, dtype=dtype)
    expected = whole.train()
    assert make(lora=lora, dtype=dtype, callbacks=(stop,)).train().interrupted
    [stored] = (tmp_path / "run" / "checkpoints" / "step-00000002").glob("average.safetensors")
    assert {tensor.dtype for tensor in load_file(stored).values()} == {torch.float32}
    resumed = make(lora=lora, dtype=dtype)
    result = resumed.train(resume=True)
    assert result.after == expected.after and metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    for name, tensor in whole.learner.average.tensors.items():
        assert torch.equal(resumed.learner.average.tensors[name], tensor), name
    saved, of_whole = (saved_weights(tmp_path / name) for name in ("run", "whole"))
    assert saved.keys() == of_whole.keys() and all(torch.equal(saved[name], of_whole[name]) for name in saved)


class Failure(Exception):
    """Of an evaluation."""


@pytest.mark.parametrize("kept_in", ["the failing thread", "the watchdog's thread"])
def test_a_failing_evaluation_loses_nothing_while_the_average_is_in_place(
    kept_in: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make("whole")
    whole.train()
    failing = make()
    evaluate = failing.algorithm.evaluate

    def fail(held_out: Any) -> Any:
        if failing.step != 2:
            return evaluate(held_out)
        assert failing.learner.average.set_aside
        if kept_in == "the watchdog's thread":  # which saves while the evaluation still waits for another rank
            failing.keeper.keep()
        raise Failure

    monkeypatch.setattr(failing.algorithm, "evaluate", fail)
    with pytest.raises(Failure):
        failing.train()
    resumed = make()
    resumed.train(resume=True)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name


def test_an_average_that_is_set_on_resuming_begins_there(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make(ema=None, num_steps=2).train()
    history: list[Tensors] = []
    resumed = make(callbacks=(lambda trainer, *_: history.append(copied(trainer.learner.trained)),))
    load = resumed.learner._load_weights

    def loaded(stored: Any) -> None:
        load(stored)
        history.append(copied(resumed.learner.trained))

    resumed.learner._load_weights = loaded
    resumed.train(resume=True)
    assert "ema was null and is 'given'" in caplog.text
    expected = averages_of(history, 0.5)
    for name, tensor in resumed.learner.average.tensors.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)


def test_an_average_of_other_weights_is_refused() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(dict(model.named_parameters()), make_optimizer(model, SFTConfig()), EMASettings())
    with pytest.raises(CheckpointError, match=r"average of the weights has no bias of shape \(2,\)"):
        average.load({"weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match=r"has no weight of shape \(2, 2\)"):
        average.load({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})


def test_early_stopping_exports_the_average_of_the_best_step(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    averages: dict[int, Tensors] = {}
    trainer = make(
        early_stopping={"metric": "loss", "patience": 1, "min_delta": 9.0},
        callbacks=(lambda trainer, step, _: averages.update({step: copied(trainer.learner.average.tensors)}),),
    )
    result = trainer.train()
    assert (result.num_steps, result.model_step) == (2, 1)
    assert_saved(tmp_path / "run", averages[1])


def test_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"decay is 1\.0"):
        EMASettings(decay=1.0)
    with pytest.raises(ConfigError, match=r"export is False, and must be true where evaluate is false"):
        EMASettings(evaluate=False, export=False)
    assert SFTConfig(ema={}, sharding={"strategy": "fsdp2"}).ema is not None
    for strategy in ("zero1", "zero2", "zero3"):
        with pytest.raises(ConfigError, match=rf"ema is 'given', and must be null with sharding\.strategy {strategy}"):
            SFTConfig(ema={}, sharding={"strategy": strategy})
    with pytest.raises(ConfigError, match=r"ema\.evaluate is False, and must be true with early_stopping"):
        SFTConfig(ema={"evaluate": False}, eval_every_steps=1, early_stopping={"metric": "loss"})
    server = {"engine": "vllm_server", "max_staleness": 2}
    assert GRPOConfig(ema={"evaluate": False}, rollout=server).ema is not None
    with pytest.raises(ConfigError, match=r"ema\.evaluate is True, and must be false with rollout\.max_staleness 2"):
        GRPOConfig(ema={}, rollout=server)
    with pytest.raises(ConfigError, match=r"policy\.ema is .*a stage goes on from the weights in training"):
        RLAIFConfig(
            path="dpo", constitution="c.yaml", judge={"backend": "model", "name": "j"},
            policy={"type": "dpo", "ema": {}},
        )
    spread = {
        "model": {"name": "m"}, "data": {"path": "rows.jsonl"}, "rewards": [{"name": "exact_match"}],
        "trainer": {"type": "grpo", "sharding": {"strategy": "zero2"}},
        "warm_start": {"trainer": {"ema": {}}},
    }
    with pytest.raises(ConfigError, match=r"warm_start\.trainer\.ema is 'given'.*strategy zero2"):
        RunConfig.model_validate(spread)
