"""The average of the weights of trainers that learn from rollouts: sampled from in evaluations alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from alignlab.config.model import LoraSettings
from alignlab.config.run import EvaluationSettings
from alignlab.loop.held_out import HeldOutProblems
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.types import SamplingParams
from tests.loop.test_averaging import Tensors, assert_saved, averages_of, copied, metrics_of, saved_weights
from tests.trainers.conftest import even_ids
from tests.trainers.steps import weights_of
from tests.trainers.tiny import ONLINE, make_case, prompts

EVALUATION = EvaluationSettings(num_samples=2)


@pytest.fixture
def make(make_model: Callable[..., Any], make_config: Callable[..., Any], tokenizer: Any, rows: Any) -> Any:
    def make(folder: str = "run", *, lora: Any = None, callbacks: Any = (), **changes: Any) -> GRPOTrainer:
        base = {"eval_every_steps": 1, "ema": {"decay": 0.5}, "output_dir": make_config().output_dir.parent / folder}
        return GRPOTrainer(
            make_model(), even_ids, make_config(**{**base, **changes}), rows, eval_dataset=prompts(3),
            tokenizer=tokenizer, peft_config=lora, evaluation=EVALUATION, callbacks=callbacks,
        )

    return make


def greedy(engine: Any, trainer: Any) -> list[Any]:
    """The engine's greedy completions of the held-out prompts."""
    rollouts = engine.generate(trainer.held_out.prompts, SamplingParams(temperature=0.0, max_new_tokens=8))
    return [rollout.completions[0].token_ids for rollout in rollouts]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all weights", "adapter"])
def test_evaluations_and_the_model_are_of_the_average(
    lora: Any, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history: list[Tensors] = []
    trainer = make(
        lora=lora, callbacks=(lambda trainer, *_: history.append(copied(trainer.learner.trained)),),
        optim={"learning_rate": 0.1},
    )
    history.append(copied(trainer.learner.trained))
    evaluated: list[tuple[Tensors, Any]] = []

    def evaluate(self: Any, engine: Any, *_: Any, **options: Any) -> None:
        evaluated.append((copied(trainer.learner.trained), greedy(engine, trainer)))

    monkeypatch.setattr(HeldOutProblems, "evaluate", evaluate)
    trainer.train()
    assert_saved(tmp_path / "run", averages_of(history, 0.5))
    assert len(evaluated) == len(history) == 5, "the last is of the run's model"
    other = make("other", lora=lora)
    for step, (weights, completions) in enumerate(evaluated):
        for name, average in averages_of(history[: step + 1], 0.5).items():
            torch.testing.assert_close(weights[name], average, rtol=1e-6, atol=1e-7)
            other.learner.trained[name].data.copy_(average)
        other.source.update_weights(other.source.engine.policy_version + 1)
        assert completions == greedy(other.source.engine, other)
    assert len({str(completions) for _, completions in evaluated}) > 1


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all weights", "adapter"])
def test_rollouts_are_of_the_weights_in_training(lora: Any, make: Any, tmp_path: Path) -> None:
    gaps: list[float] = []
    trainer = make(lora=lora, callbacks=(lambda _, __, metrics: gaps.append(metrics["rollout_gap"]),))
    without = make("without", lora=lora, ema=None)
    for each in (trainer, without):
        each.train()
    assert max(gaps) < 1e-5 and len(gaps) == 4
    weights, expected = weights_of(trainer), weights_of(without)
    assert all(torch.equal(weights[name], weight) for name, weight in expected.items())
    steps = [[line for line in metrics_of(tmp_path / name) if "loss" in line] for name in ("run", "without")]
    assert steps[0] == steps[1]


def test_a_resumed_run_equals_an_uninterrupted_one(make: Any, tmp_path: Path) -> None:
    def stop(trainer: Any, step: int, metrics: Any) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = make("whole")
    expected = whole.train()
    assert make(callbacks=(stop,)).train().interrupted
    resumed = make()
    result = resumed.train(resume=True)
    assert result.after == expected.after and metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    for name, tensor in whole.learner.average.tensors.items():
        assert torch.equal(resumed.learner.average.tensors[name], tensor), name
    saved, of_whole = (saved_weights(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(saved[name], of_whole[name]) for name in saved)


class Failure(Exception):
    """Of an evaluation."""


def test_a_run_whose_evaluation_failed_goes_on_with_the_weights_in_training(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, failing = make("whole"), make()
    evaluate = HeldOutProblems.evaluate

    def fail(self: Any, *arguments: Any, **options: Any) -> Any:
        if failing.step != 2:
            return evaluate(self, *arguments, **options)
        raise Failure

    monkeypatch.setattr(HeldOutProblems, "evaluate", fail)
    with pytest.raises(Failure):
        failing.train()
    monkeypatch.undo()
    whole.train()
    failing.train(resume=True)
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(failing)[name], weight), name


@pytest.mark.parametrize("name", ONLINE)
def test_every_trainer_averages_what_it_exports(
    name: str, make_model: Any, tokenizer: Any, tmp_path: Path
) -> None:
    trainer = make_case(name, tmp_path / "run", make_model(), tokenizer, ema={"decay": 0.5}, num_steps=2)
    start = copied(trainer.learner.trained)
    trainer.train()
    averages = {role: learner.average for role, learner in trainer.learners.items()}
    assert averages.pop("").tensors.keys() == trainer.learner.trained.keys()
    assert set(averages.values()) <= {None}, "a critic is not exported"
    average = trainer.learner.average.tensors
    assert_saved(tmp_path / "run", average)
    assert any((average[name] - start[name]).abs().max() > 0 for name in start)
    assert any((average[name] - weight).abs().max() > 0 for name, weight in copied(trainer.learner.trained).items())
