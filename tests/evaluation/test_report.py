import io
import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from alignlab.evaluation.curves import expert_loads, plot_curves, running_mean
from alignlab.evaluation.report import RunReport, write_report
from alignlab.evaluation.results import EvaluatedProblem, EvaluationResult
from alignlab.evaluation.tables import spaced_indices
from alignlab.runs.folder import RunFolder
from alignlab.runs.metrics import MetricsLogger

PNG = b"\x89PNG\r\n\x1a\n"


def result(greedy: float, *, text: str, right: bool, strict: float | None = 0.125) -> EvaluationResult:
    problems = tuple(
        EvaluatedProblem(f"What is {i} + 1?", str(i + 1), f"{text} {i}", right, ("1",), 2) for i in range(8)
    )
    return EvaluationResult(greedy, greedy / 2, strict, strict, {1: greedy / 2, 4: 0.75}, 8, 4, problems)


def report_of(folder: Path, report: RunReport) -> str:
    stream = io.StringIO()
    with RunFolder(folder, resume=False) as run:
        with MetricsLogger(folder) as logger:
            for step in range(1, 21):
                logger.log(step, {"reward": step / 20, "kl": float("nan") if step == 3 else 0.01 * step})
        write_report(run, report, console=Console(file=stream, width=140))
    return stream.getvalue()


@pytest.mark.usefixtures("curves")
def test_the_report_has_tables_examples_curves_and_the_command(tmp_path: Path) -> None:
    adapter = tmp_path / "run one" / "adapter"
    report = RunReport(
        "single-digit sums",
        before=result(0.25, text="I think", right=False),
        after=result(0.875, text="Surely", right=True),
        train_seconds=61.4,
        num_steps=20,
        adapter=adapter,
        base_model="some/model",
        generate_options=("--system-prompt", "Be brief."),
        summary={"hardware": "two cores"},
    )
    output = report_of(tmp_path / "run one", report)
    assert "single-digit sums: 8 held-out problems, 4 samples each" in output
    greedy = next(line for line in output.splitlines() if "extracted answer right, greedy" in line)
    # Wilson's of 2 and of 7 right ones of 8.
    assert [cell.strip() for cell in greedy.split("│")[2:5]] == ["0.250  0.07..0.59", "0.875  0.53..0.98", "+0.625"]
    assert "answer and nothing else, sampled" in output and "pass@4" in output and "pass@1" not in output
    assert output.count("wrong: I think") == output.count("right: Surely") == 4
    assert [f"I think {i}" in output for i in range(8)] == [True, False] * 4
    assert "trained: 20 steps in 61 s" in output and f"adapter: {adapter}" in output
    command = output.split("use it: ")[1].strip()
    assert shlex.split(command) == [
        "alignlab", "generate", "some/model", "What is 0 + 1?", "--adapter", str(adapter),
        "--system-prompt", "Be brief.", "--temperature", "0",
    ]  # fmt: skip
    saved = json.loads((tmp_path / "run one" / "report.json").read_text())
    assert saved["before"]["greedy"] == 0.25 and saved["after"]["samples"][0]["greedy"] == "Surely 0"
    assert saved["after"]["intervals"]["greedy"] == pytest.approx([0.529, 0.978], abs=1e-3)
    assert EvaluationResult.from_json(saved["after"]) == report.after
    assert (saved["command"], saved["hardware"], saved["adapter"]) == (command, "two cores", str(adapter))
    assert (tmp_path / "run one" / "curves.png").read_bytes().startswith(PNG)


def test_a_run_without_held_out_data_has_a_report(tmp_path: Path) -> None:
    report = RunReport("sft", None, None, train_seconds=1.0, num_steps=20, model=tmp_path / "model")
    output = report_of(tmp_path, report)
    assert "accuracy" not in output and f"model: {tmp_path / 'model'}" in output
    assert output.strip().endswith(f"use it: alignlab generate {tmp_path / 'model'} Hello --temperature 0")


def test_strict_rows_are_left_out_without_an_answer_column(tmp_path: Path) -> None:
    before = result(0.0, text="[bold]x[/bold]", right=False, strict=None)
    after = result(1.0, text="y" * 400, right=True, strict=None)
    output = report_of(tmp_path, RunReport("t", before, after, train_seconds=1.0, num_steps=20))
    assert "nothing else" not in output
    assert "[bold]x[/bold]" in output, "a completion's brackets are text"
    assert output.count("y") < 4 * 320 and "use it" not in output


def test_nothing_goes_to_standard_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunFolder(tmp_path, resume=False) as run:
        MetricsLogger(tmp_path).close()
        write_report(run, RunReport("t", None, None, train_seconds=1.0, num_steps=0))
    out, err = capsys.readouterr()
    assert out == "" and "trained: 0 steps" in err


def test_curves_of_a_moe_run(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        for step in range(1, 4):
            load = {f"expert_load/{i}": 0.25 for i in range(4)}
            logger.log(step, {"reward": 0.1, "accuracy": 0.2, "eval/greedy": 0.5, **load})
    assert plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", title="sums")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    assert not list(tmp_path.glob(".*.tmp"))


def test_without_metrics_no_curves_are_drawn(tmp_path: Path) -> None:
    with MetricsLogger(tmp_path) as logger:
        logger.log(1, {"other": 1.0, "kl": math.nan})
    assert not plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_running_mean_by_hand() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
    assert running_mean([1.0, 3.0], 1) == [1.0, 3.0]


def test_expert_loads_are_the_last_known() -> None:
    lines = [{"expert_load/0": 0.9, "expert_load/1": 0.1}, {"expert_load/0": 0.6, "reward": 1.0}]
    assert expert_loads(lines) == {"0": 0.6, "1": 0.1}


def test_examples_are_evenly_spaced_and_not_picked() -> None:
    assert spaced_indices(8, 4) == [0, 2, 4, 6]
    assert spaced_indices(10, 4) == [0, 2, 5, 7]
    assert spaced_indices(3, 4) == [0, 1, 2]
    assert spaced_indices(0, 4) == []


def test_completions_of_different_problems_are_not_shown_side_by_side(tmp_path: Path) -> None:
    before, after = (result(0.5, text="a", right=True) for _ in range(2))
    other = replace(after, samples=tuple(replace(each, prompt="another") for each in after.samples))
    output = report_of(tmp_path, RunReport("t", before, other, train_seconds=1.0, num_steps=20))
    assert "greedy completions" not in output and "before and after were measured on other problems" in output
