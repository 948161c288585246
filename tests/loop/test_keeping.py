"""After a failure the last completed step is saved, and the resumed run equals one that never failed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from alignlab.config.trainers import SFTConfig
from alignlab.errors import CheckpointError, NothingLearntError, NumericsError
from alignlab.files.manifest import MODEL_MANIFEST, find_damage
from alignlab.loop import step_keeper as keeping
from alignlab.trainers.grpo import GRPOTrainer
from alignlab.trainers.sft import SFTTrainer
from tests.ranks import ROOT, run_ranks
from tests.settings import merged
from tests.trainers.conftest import SPARSE, even_ids

Make = Callable[..., Any]
EXAMPLES = [{"prompt": f"ab{i}", "completion": f"ba{i}"} for i in range(4)]


class Failure(Exception):
    """An error in code that the run calls."""


@pytest.fixture
def grpo(make_model: Make, make_config: Make, rows: Any, tokenizer: Any, tmp_path: Path) -> Make:
    def make(name: str = "run", **changes: Any) -> GRPOTrainer:
        base: dict[str, Any] = {"num_steps": 3, "num_minibatches": 2, "eval_every_steps": 2}
        return GRPOTrainer(
            make_model(), even_ids, make_config(output_dir=tmp_path / name, **merged(base, changes)), rows,
            eval_dataset=rows[:2], tokenizer=tokenizer,
        )

    return make


@pytest.fixture
def sft(make_model: Make, tokenizer: Any, tmp_path: Path) -> Make:
    def make(model: Any = None, **changes: Any) -> SFTTrainer:
        base: dict[str, Any] = {"output_dir": tmp_path / "run", "num_steps": 3, "num_sequences": 2, "trackers": ()}
        return SFTTrainer(model or make_model(), SFTConfig(**merged(base, changes)), EXAMPLES, tokenizer=tokenizer)

    return make


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    """Return the metrics of each step, without times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{n: v for n, v in line.items() if n != "time" and "_s" not in n} for line in lines]


def saved_steps(trainer: Any) -> list[str]:
    return sorted(path.name for path in (trainer.config.output_dir / "checkpoints").iterdir())


def check_resumed_run_equals_straight_run(make: Make) -> None:
    """Resume the run, and compare weights and metrics with a run that never failed."""
    resumed, straight = make(), make("straight")
    resumed.train(resume=True)
    straight.train()
    weights, expected = (trainer.learner.model.state_dict() for trainer in (resumed, straight))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert metrics_of(resumed.config.output_dir) == metrics_of(straight.config.output_dir)


def fails_at(calls: int, function: Callable[..., Any], error: BaseException) -> Callable[..., Any]:
    """Return the function, which raises an error in place of its n-th call, from 1."""
    done: list[int] = []

    def failing(*args: Any, **options: Any) -> Any:
        done.append(1)
        if len(done) == calls:
            torch.rand(5)  # draws random numbers before it fails
            raise error
        return function(*args, **options)

    return failing


def test_failure_in_the_second_mini_batch_loses_no_completed_step(grpo: Make) -> None:
    trainer = grpo()
    trainer.learner.update = fails_at(6, trainer.learner.update, Failure("kernel"))
    with pytest.raises(Failure):
        trainer.train()
    assert saved_steps(trainer) == ["step-00000002"]
    check_resumed_run_equals_straight_run(grpo)


def test_failure_in_an_evaluation_loses_no_step_and_the_evaluation_is_repeated(grpo: Make) -> None:
    trainer = grpo()
    trainer.evaluate = fails_at(2, trainer.evaluate, Failure("scorer"))
    with pytest.raises(Failure):
        trainer.train()
    assert saved_steps(trainer) == ["step-00000002"]
    assert not any("eval/greedy" in line for line in metrics_of(trainer.config.output_dir)[1:])
    check_resumed_run_equals_straight_run(grpo)


def test_metrics_line_that_cannot_be_written_is_written_after_resumption(
    grpo: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from alignlab.runs import metrics_file

    class FullDisk:
        """Takes a part of one line."""

        def __init__(self, file: Any) -> None:
            self.file, self.lines = file, 0

        def write(self, content: Any) -> int:
            self.lines += 1
            if self.lines == 3:  # after the evaluation before the training, and the first step
                return int(self.file.write(content[:20]))
            if self.lines == 4:
                raise OSError(28, "No space left on device")
            return int(self.file.write(content))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    opened = metrics_file.MetricsFile.__init__

    def on_full_disk(self: Any, *args: Any, **options: Any) -> None:
        opened(self, *args, **options)
        self._file = FullDisk(self._file)

    with monkeypatch.context() as patched:
        patched.setattr(metrics_file.MetricsFile, "__init__", on_full_disk)
        trainer = grpo()
        with pytest.raises(OSError, match="No space left"):
            trainer.train()
    assert saved_steps(trainer) == ["step-00000002"]
    assert len(metrics_of(trainer.config.output_dir)) == 2, "no half line"
    check_resumed_run_equals_straight_run(grpo)


@pytest.mark.parametrize("error", [SystemExit(0), KeyboardInterrupt()], ids=["exit", "second Ctrl-C"])
def test_exit_of_the_process_loses_no_step(error: BaseException, sft: Make) -> None:
    trainer = sft()
    trainer.learner.update = fails_at(3, trainer.learner.update, error)
    with pytest.raises(type(error)):
        trainer.train()
    assert saved_steps(trainer) == ["step-00000002"]
    ends = [json.loads(line) for line in (trainer.config.output_dir / "ends.jsonl").read_text().splitlines()]
    outcome = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
    assert [(end["outcome"], end["step"]) for end in ends] == [(outcome, 2)]


def test_failure_within_the_optimizer_step_loses_no_completed_step(sft: Make, tmp_path: Path) -> None:
    trainer = sft()
    step = trainer.learner.strategy.step

    def failing() -> None:
        step()
        if trainer.step == 2:
            raise Failure("out of memory")

    trainer.learner.strategy.step = failing
    with pytest.raises(Failure):
        trainer.train()
    resumed, straight = sft(), sft(output_dir=tmp_path / "straight")
    resumed.train(resume=True)
    straight.train()
    weights, expected = (trainer.learner.model.state_dict() for trainer in (resumed, straight))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_same_trainer_resumes_without_gradients_of_the_failed_step(
    make_model: Make, sft: Make, tmp_path: Path
) -> None:
    """The failed step leaves gradients of its first pack, and counts of its routers."""
    trainer = sft(make_model(SPARSE), memory={"tokens_per_microbatch": 8})
    trainer.algorithm.loss = fails_at(6, trainer.algorithm.loss, Failure("second pack of the third step"))
    with pytest.raises(Failure):
        trainer.train()
    straight = sft(make_model(SPARSE), memory={"tokens_per_microbatch": 8}, output_dir=tmp_path / "straight")
    trainer.train(resume=True)
    straight.train()
    weights, expected = (done.learner.module.state_dict() for done in (trainer, straight))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_weights_too_large_to_be_copied_are_not_saved_half_changed(
    grpo: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(keeping, "MAX_COPY_BYTES", 0)
    trainer = grpo(checkpoints={"every_steps": 1})
    trainer.learner.update = fails_at(6, trainer.learner.update, Failure("kernel"))
    with pytest.raises(Failure):
        trainer.train()
    assert saved_steps(trainer) == ["step-00000001", "step-00000002"]
    trainer = grpo("other")
    trainer.learner.update = fails_at(6, trainer.learner.update, Failure("kernel"))
    with pytest.raises(Failure):
        trainer.train()
    assert not (trainer.config.output_dir / "checkpoints").exists()
    assert "too large to be copied before each step: step 2 is lost" in " ".join(capsys.readouterr().err.split())


def spoil(trainer: Any, number: float, where: Callable[[Any], torch.Tensor]) -> None:
    """Overwrite one trained number after the second update."""
    update = trainer.learner.update

    def spoiling(*args: Any, **options: Any) -> Any:
        metrics = update(*args, **options)
        if trainer.step == 1:
            with torch.no_grad():
                where(trainer.learner).view(-1)[0] = number
        return metrics

    trainer.learner.update = spoiling


@pytest.mark.parametrize("number", [float("nan"), float("-inf")])
def test_weight_that_is_not_finite_is_not_saved(number: float, sft: Make) -> None:
    trainer = sft(checkpoints={"every_steps": 1})
    spoil(trainer, number, lambda learner: learner.trained["model.model.norm.weight"])
    with pytest.raises(NumericsError, match=r"weights after step 2 must be finite, and 1 of 32 .*norm\.weight"):
        trainer.train()
    assert saved_steps(trainer) == ["step-00000001"]
    assert not (trainer.config.output_dir / "model").exists()
    assert sft().train(resume=True).num_steps == 3


def test_optimizer_state_that_is_not_finite_is_not_saved(sft: Make) -> None:
    trainer = sft(num_steps=2)

    def moment(learner: Any) -> torch.Tensor:
        state: torch.Tensor = learner.optimizer.state[learner.trained["model.model.norm.weight"]]["exp_avg_sq"]
        return state

    spoil(trainer, float("inf"), moment)
    with pytest.raises(NumericsError, match=r"optimizer's state after step 2 .*exp_avg_sq\.model\.model\.norm\.weight"):
        trainer.train()
    assert not (trainer.config.output_dir / "model").exists()


def test_run_with_all_updates_skipped_ends_with_an_error(sft: Make) -> None:
    trainer = sft(optim={"on_nonfinite": "skip"})
    trainer.algorithm.loss = lambda output, pack: (output.label_loss * float("nan"), {})
    with pytest.raises(NothingLearntError, match="no gradient was finite, so that every update was skipped") as caught:
        trainer.train()
    assert caught.value.result.verdict.learnt is False
    report = json.loads((trainer.config.output_dir / "report.json").read_text())
    assert report["learnt"] is False and report["run"] == caught.value.result.run_id


def test_verdict_warns_of_skipped_updates(sft: Make) -> None:
    trainer = sft(optim={"on_nonfinite": "skip"})
    loss, calls = trainer.algorithm.loss, []

    def once(output: Any, pack: Any) -> Any:
        calls.append(1)
        value, metrics = loss(output, pack)
        return value * (float("nan") if len(calls) == 1 else 1.0), metrics

    trainer.algorithm.loss = once
    (warning,) = trainer.train().verdict.warnings
    assert warning == "1 updates were skipped, as a gradient was not finite; lower optim.learning_rate"


def test_model_that_is_not_finite_is_refused(sft: Make, make_model: Make) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericsError, match=r"weights that the run begins with must be finite.*up_proj"):
        sft(model, optim={"on_nonfinite": "skip"}).train()


def test_files_of_a_run_hold_its_id(grpo: Make) -> None:
    result = grpo(num_steps=1).train()
    folder = result.folder
    manifests = [folder / "checkpoints" / "step-00000001" / "manifest.json", result.model_path / MODEL_MANIFEST]
    for file in (*manifests, folder / "report.json", folder / "starts.jsonl", folder / "ends.jsonl"):
        assert json.loads(file.read_text())["run"] == result.run_id, file
    (rollouts,) = (folder / "rollouts").glob("*.parquet")
    assert pq.read_schema(rollouts).metadata[b"alignlab.run"].decode() == result.run_id
    assert find_damage(result.model_path) is None


def test_checkpoint_of_another_run_is_refused(sft: Make, tmp_path: Path) -> None:
    sft().train()
    sft(output_dir=tmp_path / "other").train()
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.copytree(tmp_path / "other" / "checkpoints", tmp_path / "run" / "checkpoints")
    with pytest.raises(CheckpointError, match="is of another run"):
        sft(num_steps=4).train(resume=True)


def test_removed_newest_checkpoint_is_reported(
    sft: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    sft(checkpoints={"every_steps": 1}).train()
    shutil.rmtree(folder / "checkpoints" / "step-00000003")
    sft(checkpoints={"every_steps": 1}).train(resume=True)
    assert "the newest checkpoint, of step 3, is gone: going on after step 2" in caplog.text
    metrics = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(CheckpointError, match=r"has saved a checkpoint of step 3, and .* holds none"):
        sft().train(resume=True)
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    (folder / "saved.json").write_bytes((folder / "saved.json").read_bytes().replace(b"3", b"2", 1))
    caplog.clear()
    sft().train(resume=True)
    assert "saved.json must say which step was saved last, and does not (its SHA-256" in caplog.text


def test_run_resumed_with_fewer_steps_than_done_keeps_one_line_per_evaluation(grpo: Make) -> None:
    grpo().train()
    metrics = metrics_of(grpo().config.output_dir)
    grpo(num_steps=2).train(resume=True)
    assert metrics_of(grpo().config.output_dir) == metrics


def test_a_removal_that_a_power_cut_has_undone_is_done_again(grpo: Make) -> None:
    settings = {"num_steps": 2, "checkpoints": {"every_steps": 1, "keep": 1}}
    grpo(**settings).train()
    folder = grpo(**settings).config.output_dir / "checkpoints"
    shutil.copytree(folder / "step-00000002", folder / "step-00000001")
    grpo(**settings).train(resume=True)
    assert [path.name for path in folder.iterdir()] == ["step-00000002"]


@pytest.mark.distributed
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "zero3"])
def test_failure_of_one_of_two_ranks_loses_no_step(tmp_path: Path, strategy: str) -> None:
    done = run_ranks(str(ROOT / "tests/loop/rank_keeping.py"), str(tmp_path), strategy)
    assert done.returncode != 0 and "Failure: kernel" in done.stderr, done.stderr[-3000:]
    straight = load_file(tmp_path / "straight" / "model" / "model.safetensors")
    for name, rank, reason in (
        ("fail_in_callback", 1, "inbox"), ("fail_in_evaluation", 1, "scorer"), ("fail_in_collecting", 0, "reward"),
    ):
        assert (tmp_path / f"{name}.{rank}").read_text() == f"Failure: {reason}"
        other = (tmp_path / f"{name}.{1 - rank}").read_text()
        assert other.startswith("RankError: ") and f"rank {rank}: Failure: {reason}" in other
        resumed = load_file(tmp_path / name / "model" / "model.safetensors")
        assert all(torch.equal(resumed[weight], straight[weight]) for weight in straight), name
        assert metrics_of(tmp_path / name) == metrics_of(tmp_path / "straight"), name
    runs = {path.parent.parent.name: json.loads(path.read_text())["run"]
            for path in tmp_path.glob("*/model/alignlab-manifest.json")}
    assert len(set(runs.values())) == len(runs) == 5
    for rank in (0, 1):
        told = [(tmp_path / f"not_finite.{rank}.{attempt}").read_text() for attempt in (1, 2)]
        assert told[0] == told[1] and told[0].startswith("after step 2: the gradient is not finite"), told
    resumed = load_file(tmp_path / "not_finite" / "model" / "model.safetensors")
    assert all(torch.equal(resumed[weight], straight[weight]) for weight in straight)
    saved, expected = (tmp_path / run / "checkpoints" / "step-00000002" for run in ("alone", "straight"))
    names = sorted(path.name for path in expected.glob("*.safetensors"))
    assert len(names) == (4 if strategy == "ddp" else 6), "a file of weights and one of states, or one a rank"
    for name in names:
        assert (saved / name).read_bytes() == (expected / name).read_bytes(), name
