"""Early stopping: which evaluation is best, when a run ends, which model it results in, and resumption."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignlab.config.model import LoraSettings
from alignlab.config.run import RunConfig, WarmStart
from alignlab.config.trainer import EarlyStoppingSettings
from alignlab.config.trainers import DistillConfig, DPOConfig, GRPOConfig, RLAIFConfig, SFTConfig
from alignlab.errors import CheckpointError, ConfigError
from alignlab.evaluation.results import EvaluationResult, LikelihoodResult, PreferenceResult
from alignlab.loop.early_stopping import EarlyStopping
from alignlab.run_from_config import run
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.sft import SFT, SFTTrainer
from tests.settings import merged
from tests.trainers.conftest import even_ids
from tests.trainers.steps import weights_of

Make = Callable[..., Any]
ROWS = [{"prompt": f"ab{i}", "completion": "ab" * (1 + i % 3)} for i in range(8)]
LOSSES = {0: 0.1, 1: 5.0, 2: 3.0, 3: 3.1, 4: 2.9, 5: 3.0, 6: 3.0, 7: 1.0}
"""Scripted held-out losses by step. With patience 2 the run ends after step 6, and step 4 is best."""


def of_loss(loss: float) -> LikelihoodResult:
    return LikelihoodResult(loss, 1, 1)


def steps_until_end(settings: EarlyStoppingSettings, results: Sequence[Any]) -> tuple[int | None, int | None]:
    """Return after which evaluation a run ends, and which one is best."""
    stopping = EarlyStopping(settings)
    for step, result in enumerate(results, start=1):
        stopping.observe(step, result)
        if stopping.ends_run:
            return step, stopping.best and stopping.best.step
    return None, stopping.best and stopping.best.step


@pytest.mark.parametrize(
    ("options", "losses", "end", "best"),
    [
        ({"patience": 1}, [3.0, 2.0, 2.0], 3, 2),
        ({"patience": 2}, [3.0, 2.0, 2.5, 1.9, 2.0, 2.0], 6, 4),
        ({"patience": 2}, [3.0, 2.0, 1.0], None, 3),
        ({"patience": 2, "min_delta": 0.5}, [3.0, 2.6, 2.5, 2.4], 3, 1),  # 2.5 is better by 0.5, and not by more
        ({"patience": 3, "min_delta": 0.5}, [3.0, 2.6, 2.4, 2.0, 1.8], None, 5),
        ({"patience": 2}, [math.nan, 2.0, math.nan, 3.0], 4, 2),
        ({"patience": 2}, [math.nan, math.inf], 2, None),
    ],
)
def test_a_run_ends_after_patience_evaluations_without_a_lower_loss(
    options: Any, losses: list[float], end: int | None, best: int | None
) -> None:
    settings = EarlyStoppingSettings(metric="loss", **options)
    assert steps_until_end(settings, list(map(of_loss, losses))) == (end, best)


def test_accuracy_improves_by_rising() -> None:
    results = [PreferenceResult(accuracy, 0.0, 9.0 - step, 4) for step, accuracy in enumerate([0.5, 0.7, 0.6, 0.7])]
    assert steps_until_end(EarlyStoppingSettings(metric="accuracy", patience=2), results) == (4, 2)
    assert steps_until_end(EarlyStoppingSettings(metric="loss", patience=2), results) == (None, 4)


def test_the_state_goes_through_json_after_every_evaluation() -> None:
    settings = EarlyStoppingSettings(metric="loss", patience=9)
    whole, resumed = EarlyStopping(settings), EarlyStopping(settings)
    for step, loss in enumerate([3.0, 2.0, 2.5, 1.9, 2.0], start=1):
        whole.observe(step, of_loss(loss))
        resumed.observe(step, of_loss(loss))
        state = json.loads(json.dumps(resumed.state()))
        resumed = EarlyStopping(settings)
        resumed.load_state(state)
        assert (resumed.best, resumed.latest, resumed.num_without) == (whole.best, whole.latest, whole.num_without)


def test_without_settings_nothing_is_kept_and_nothing_ends() -> None:
    stopping = EarlyStopping(None)
    assert not stopping.observe(1, of_loss(1.0)) and not stopping.ends_run
    assert (stopping.state(), stopping.kept_steps, stopping.model_step(7)) == (None, (), 7)
    assert stopping.outcome(7) is None


class Failure(Exception):
    """Of an evaluation."""


@pytest.fixture
def make(make_model: Make, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Make trainers whose held-out losses are scripted; `fails_at` fails in the evaluation after a step, once."""

    def make(folder: str = "run", *, lora: Any = None, callbacks: Any = (), fails_at: int | None = None,
             losses: Any = LOSSES, **changes: Any) -> SFTTrainer:
        base: dict[str, Any] = {
            "num_steps": 7, "num_sequences": 4, "optim": {"learning_rate": 1e-2}, "trackers": (),
            "eval_every_steps": 1, "checkpoints": {"keep": 1}, "early_stopping": {"metric": "loss", "patience": 2},
        }
        config = SFTConfig(output_dir=tmp_path / folder, **merged(base, changes))
        trainer = SFTTrainer(
            make_model(), config, ROWS, eval_dataset=ROWS[:2], tokenizer=tokenizer, peft_config=lora,
            callbacks=callbacks,
        )

        def evaluate(held_out: Any) -> LikelihoodResult:
            if trainer.step == fails_at:
                raise Failure
            return of_loss(losses[trainer.step])

        monkeypatch.setattr(trainer.algorithm, "evaluate", evaluate)
        return trainer

    return make


def recorder(weights: dict[int, dict[str, torch.Tensor]]) -> Callable[..., None]:
    """Return a callback that keeps the weights after each step."""

    def keep(trainer: Any, step: int, metrics: Any) -> None:
        weights[step] = {name: weight.clone() for name, weight in weights_of(trainer).items()}

    return keep


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the weights of a run's model or adapter, by names as the trainer has them."""
    [path] = [path for name in ("model", "adapter") for path in (folder / name).glob("*.safetensors")]
    return load_file(path)


def assert_is_model(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    saved = saved_weights(folder)
    assert saved
    for name, tensor in saved.items():
        [own] = [key for key in weights if key.removeprefix("model.").replace(".default", "") == name]
        assert torch.equal(tensor, weights[own].float()), name


def checkpoints_of(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").iterdir())


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "time" and "_s" not in n} for line in lines]


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=2)], ids=["all weights", "adapter"])
@pytest.mark.parametrize(("export", "model_step"), [("best", 4), ("last", 6)])
def test_a_run_ends_early_with_the_model_and_the_checkpoint_that_it_names(
    lora: Any, export: str, model_step: int, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights: dict[int, Any] = {}
    trainer = make(lora=lora, callbacks=(recorder(weights),), early_stopping={"export": export})
    result = trainer.train()
    folder = tmp_path / "run"
    assert (result.num_steps, result.interrupted, result.model_step) == (6, False, model_step)
    assert_is_model(folder, weights[model_step])
    assert not torch.equal(*(next(iter(weights[step].values())) for step in (4, 6)))
    assert result.after == of_loss(LOSSES[model_step]) and result.before == of_loss(LOSSES[0])
    assert checkpoints_of(folder) == [4, 6]  # the best, and the newest as keep says
    outcome = {
        "metric": "loss", "ended_run": True, "best_step": 4, "best_value": 2.9, "model_step": model_step,
    }
    report = json.loads((folder / "report.json").read_text())
    assert report["early_stopping"] == outcome and report["num_steps"] == 6
    shown = " ".join(capsys.readouterr().err.split())
    assert "early stopping: held-out loss has not improved in 2 evaluations; best loss 2.9 after step 4" in shown
    assert f"the model is that of step {model_step}, the {export}" in shown
    measured = [line["step"] for line in metrics_of(folder) if "eval/loss" in line]
    assert measured == [0, 1, 2, 3, 4, 5, 6]  # each once
    assert all(torch.equal(weight, weights[6][name]) for name, weight in weights_of(trainer).items())


def test_a_run_to_its_last_step_measures_that_step_too_and_exports_the_best(make: Make, tmp_path: Path) -> None:
    weights: dict[int, Any] = {}
    trainer = make(callbacks=(recorder(weights),), eval_every_steps=2, num_steps=5)
    result = trainer.train()
    assert (result.num_steps, result.model_step, result.stopping.ended_run) == (5, 4, False)
    assert [line["step"] for line in metrics_of(tmp_path / "run") if "eval/loss" in line] == [0, 2, 4, 5]
    assert_is_model(tmp_path / "run", weights[4])


def test_where_the_last_step_is_best_it_is_the_model(make: Make, tmp_path: Path) -> None:
    weights: dict[int, Any] = {}
    result = make(callbacks=(recorder(weights),), early_stopping={"patience": 9}).train()
    assert (result.num_steps, result.model_step, result.after) == (7, 7, of_loss(1.0))
    assert_is_model(tmp_path / "run", weights[7])
    assert checkpoints_of(tmp_path / "run") == [7]


def test_without_a_finite_number_the_last_model_is_exported_and_said(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = make(losses=dict.fromkeys(range(9), math.nan)).train()
    assert (result.num_steps, result.model_step, result.stopping.best_step) == (2, 2, None)
    assert "no held-out loss was a finite number; the model is that of step 2" in capsys.readouterr().err


@pytest.mark.parametrize("step", range(1, 7))
@pytest.mark.parametrize("how", ["stopped", "failed in the evaluation"])
def test_resumed_run_equals_an_uninterrupted_run(step: int, how: str, make: Make, tmp_path: Path) -> None:
    def stop(trainer: Any, at: int, metrics: Any) -> None:
        if at == step:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = make("whole")
    expected = whole.train()
    if how == "stopped":
        assert make(callbacks=(stop,)).train().num_steps == step
    else:
        with pytest.raises(Failure):
            make(fails_at=step).train()
    resumed = make()
    result = resumed.train(resume=True)
    assert (result.num_steps, result.model_step, result.after) == (6, 4, expected.after)
    assert result.stopping == expected.stopping
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert checkpoints_of(tmp_path / "run") == checkpoints_of(tmp_path / "whole")
    for name, weight in weights_of(whole).items():
        assert torch.equal(weights_of(resumed)[name], weight), name
    saved, of_whole = (saved_weights(tmp_path / name) for name in ("run", "whole"))
    assert saved.keys() == of_whole.keys() and all(torch.equal(saved[name], of_whole[name]) for name in saved)


def test_a_run_that_has_ended_ends_again_and_goes_on_with_more_patience(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make().train()
    again = make().train(resume=True)
    assert (again.num_steps, again.model_step, again.after) == (6, 4, first.after)
    more = make(early_stopping={"patience": 3}).train(resume=True)
    assert "early_stopping.patience was 2 and is 3" in caplog.text
    assert (more.num_steps, more.model_step, more.after) == (7, 7, of_loss(1.0))


def test_another_metric_is_refused_and_a_first_one_begins_where_it_is_set(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(num_steps=3, early_stopping=None, checkpoints={"keep": 3, "every_steps": 1}).train()
    resumed = make().train(resume=True)
    assert (resumed.num_steps, resumed.stopping.best_step) == (6, 4)  # 4: 2.9, 5: 3.0, 6: 3.0
    settings = {"metric": "accuracy", "patience": 2}
    monkeypatch.setitem(__import__("alignlab.config.trainer", fromlist=["EVALUATED"]).EVALUATED, "likelihood",
                        ("loss", "accuracy"))
    with pytest.raises(CheckpointError, match=r"early_stopping\.metric was 'loss' and is 'accuracy'"):
        make(early_stopping=settings).train(resume=True)


def test_a_best_checkpoint_that_is_gone_is_named_and_the_last_model_can_be_taken(make: Make, tmp_path: Path) -> None:
    make().train()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    with pytest.raises(CheckpointError, match=r"step-00000004 is gone; put it back.*early_stopping\.export: last"):
        make().train(resume=True)
    assert make(early_stopping={"export": "last"}).train(resume=True).model_step == 6


def test_models_beside_checkpoints_stay_with_them(make: Make, tmp_path: Path) -> None:
    make(checkpoints={"with_model": True}).train()
    assert sorted(path.name for path in (tmp_path / "run" / "models").iterdir()) == ["step-00000004", "step-00000006"]


def test_reinforcement_learning_ends_early_too(
    make_model: Make, make_config: Make, rows: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By accuracy; checkpoints.keep is 2."""

    def make() -> GRPOTrainer:
        config = make_config(
            num_steps=6, eval_every_steps=1, early_stopping={"metric": "greedy", "patience": 2},
        )
        trainer = GRPOTrainer(make_model(), even_ids, config, rows, eval_dataset=rows[:2], tokenizer=tokenizer)
        values = {0: 0.9, 1: 0.25, 2: 0.5, 3: 0.5, 4: 0.25}
        monkeypatch.setattr(
            trainer, "evaluate", lambda: EvaluationResult(values[trainer.step], 0.0, None, None, {1: 0.0}, 2, 1)
        )
        return trainer

    result = make().train()
    assert (result.num_steps, result.model_step, result.after.greedy) == (4, 2, 0.5)
    assert make().train(resume=True).after == result.after
    assert checkpoints_of(tmp_path / "run") == [2, 4]  # that of step 1 was the best for a while


CONFIG: dict[str, Any] = {
    "model": {
        "architecture": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
                         "num_key_value_heads": 2},
        "tokenizer": {"vocab_size": 300, "num_texts": 50},
    },
    "trainer": {"type": "sft", "num_steps": 7, "num_sequences": 4, "eval_every_steps": 1, "trackers": [],
                "early_stopping": {"metric": "loss", "patience": 2}},
}


def test_a_run_from_a_config_ends_early_and_says_so_in_its_closing_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    losses = iter(LOSSES.values())
    monkeypatch.setattr(SFT, "evaluate", lambda algorithm, held_out: of_loss(next(losses)))
    data = {"data": {"path": str(rows)}, "eval_data": {"path": str(rows), "size": 3}}
    config = merged(CONFIG, data | {"trainer": {"output_dir": tmp_path / "run"}})
    closing = run(RunConfig.model_validate(config)).to_json()
    assert closing["interrupted"] is False and closing["num_steps"] == 6 and closing["after"]["loss"] == 2.9
    assert closing["early_stopping"] == {
        "metric": "loss", "ended_run": True, "best_step": 4, "best_value": 2.9, "model_step": 4
    }
    without = {name: value for name, value in config.items() if name != "eval_data"}
    with pytest.raises(ConfigError, match=r"eval_data is null, and must be given with trainer\.early_stopping"):
        RunConfig.model_validate(without)


def test_settings(make_model: Make, tokenizer: Any, tmp_path: Path) -> None:
    given: dict[str, Any] = {"early_stopping": {"metric": "loss"}}
    with pytest.raises(ConfigError, match=r"eval_every_steps is null, and must be given with early_stopping.*use 10"):
        SFTConfig(**given)
    given["eval_every_steps"] = 1
    with pytest.raises(ConfigError, match=r"early_stopping\.metric is 'loss', and must be greedy or sampled"):
        GRPOConfig(**given)
    with pytest.raises(ConfigError, match=r"early_stopping\.metric is 'accuracy', and must be loss for"):
        SFTConfig(eval_every_steps=1, early_stopping={"metric": "accuracy"})
    assert DPOConfig(eval_every_steps=1, early_stopping={"metric": "accuracy"}).early_stopping is not None
    with pytest.raises(ConfigError, match="patience is 0"):
        EarlyStoppingSettings(metric="loss", patience=0)
    with pytest.raises(ConfigError, match="metric"):
        EarlyStoppingSettings()
    greedy = {"early_stopping": {"metric": "greedy"}}
    with pytest.raises(ConfigError, match="must be null for a trainer that measures before and after training only"):
        DistillConfig(teacher={"name": "t"}, **greedy)
    with pytest.raises(ConfigError, match=r"trainer\.early_stopping .*in a warm start"):
        WarmStart(trainer=SFTConfig(**given))
    with pytest.raises(ConfigError, match="early_stopping is given, and must be null where there is no held-out data"):
        SFTTrainer(
            make_model(), SFTConfig(output_dir=tmp_path / "run", trackers=(), **given), ROWS, tokenizer=tokenizer
        ).train()


def test_stages_of_rlaif_have_none() -> None:
    policy = {"type": "dpo", "eval_every_steps": 1, "early_stopping": {"metric": "loss"}}
    with pytest.raises(ConfigError, match=r"policy\.e\w+ is .*be left out: held-out data is looked at before"):
        RLAIFConfig(path="dpo", constitution="c.yaml", judge={"backend": "model", "name": "j"}, policy=policy)
