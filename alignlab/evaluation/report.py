"""The closing report of a run: report.json, curves.png, results before and after, and how to use the trained model."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from alignlab.evaluation.curves import plot_curves
from alignlab.evaluation.held_out_intervals import intervals_of
from alignlab.evaluation.learning_signal import Verdict
from alignlab.evaluation.results import Evaluation, EvaluationResult
from alignlab.evaluation.tables import change_table, examples_table
from alignlab.files.atomic_files import write_atomically
from alignlab.runs.folder import RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunReport:
    """The content of a run's closing report.

    Attributes:
        title: the run's name, such as its task.
        before, after: held-out results before and after the training; None without held-out data.
        train_seconds: time spent in steps.
        num_steps: steps done.
        adapter: folder of the saved adapter; None if all weights were trained.
        model: folder of the saved model; None if an adapter was trained.
        base_model: name or folder of the model that the adapter belongs on.
        generate_options: flags with which `alignlab generate` renders a prompt as the training did, such as
            --system-prompt TEXT.
        usage_hint: how to use the trained model; None for the `alignlab generate` command.
        summary: more entries for report.json.
        verdict: whether anything was learnt, and why not.
        run_id: id of the run, see `RunFolder`.
        after_step: step of the weights that `after` is about; None for the last.
        early_stopping: which step was best, and which one the model is of; None without early stopping.
    """

    title: str
    before: Evaluation | None
    after: Evaluation | None
    train_seconds: float
    num_steps: int
    adapter: Path | None = None
    model: Path | None = None
    base_model: str | None = None
    generate_options: tuple[str, ...] = ()
    usage_hint: str | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)
    run_id: str | None = None
    after_step: int | None = None
    early_stopping: str | None = None

    @property
    def command(self) -> str | None:
        """Command that generates a greedy completion of the first held-out problem; `usage_hint` if there is one."""
        if self.usage_hint is not None:
            return self.usage_hint
        problems = self.after.samples if isinstance(self.after, EvaluationResult) else ()
        problem = problems[0].prompt if problems else "Hello"
        if self.adapter is not None and self.base_model is not None:
            policy = [self.base_model, problem, "--adapter", str(self.adapter)]
        elif self.model is not None:
            policy = [str(self.model), problem]
        else:
            return None
        return shlex.join(["alignlab", "generate", *policy, *self.generate_options, "--temperature", "0"])

    def to_json(self) -> dict[str, Any]:
        """Return the content of report.json."""
        return {
            "run": self.run_id,
            "title": self.title,
            "num_steps": self.num_steps,
            "train_seconds": self.train_seconds,
            "before": _with_intervals(self.before),
            "after": _with_intervals(self.after),
            "adapter": None if self.adapter is None else str(self.adapter),
            "model": None if self.model is None else str(self.model),
            "base_model": self.base_model,
            "command": self.command,
            **self.verdict.to_json(),
            **self.summary,
        }


def _with_intervals(result: Evaluation | None) -> dict[str, Any] | None:
    """Return a result as JSON with the 95 % intervals of its figures."""
    return None if result is None else result.to_json() | {"intervals": intervals_of(result)}


def write_report(run: RunFolder, report: RunReport, *, console: Console | None = None) -> None:
    """Write report.json and curves.png, and show the report on stderr."""
    console = console or Console(stderr=True)
    after_step = report.num_steps if report.after_step is None else report.after_step
    results = ((0, report.before), (after_step, report.after))
    evaluations = {step: result.metrics() for step, result in results if result is not None}
    write_atomically(run.report_file, json.dumps(report.to_json(), indent=1) + "\n")
    is_drawn = _draw_curves(run, report.title, evaluations)
    _show_results(console, report)
    lines = [
        ("trained", f"{report.num_steps} steps in {report.train_seconds:.0f} s"),
        ("early stopping", report.early_stopping),
        ("curves", run.curves_file if is_drawn else None),
        ("adapter", report.adapter),
        ("model", report.model),
        *(("warning", text) for text in report.verdict.warnings),
        ("no success", report.verdict.reason),
        ("use it", report.command),
    ]
    for name, value in lines:
        if value is not None:
            _show(console, name, str(value))


def _draw_curves(run: RunFolder, title: str, evaluations: Mapping[int, Mapping[str, float]]) -> bool:
    """Draw the curves, and return whether there are any; a failure is logged, and does not end the run."""
    if not run.metrics_file.exists():
        return False  # the metrics of a run of several stages are in the folders of the stages
    try:
        return plot_curves(run.metrics_file, run.curves_file, title=title, evaluations=evaluations)
    except Exception as error:
        logger.warning(
            "the curves could not be drawn (%s: %s); %s has their values",
            type(error).__name__, error, run.metrics_file,
        )  # fmt: skip
        return False


def _show_results(console: Console, report: RunReport) -> None:
    """Show results before and after, and some completions of problems."""
    before, after = report.before, report.after
    if before is None or after is None or type(before) is not type(after):
        return
    console.print(change_table(before, after, title=report.title))
    if isinstance(before, EvaluationResult) and isinstance(after, EvaluationResult):
        if [problem.prompt for problem in before.samples] == [problem.prompt for problem in after.samples]:
            console.print(examples_table(before.samples, after.samples))
        else:  # a run of an earlier version could go on with other data
            _show(console, "warning", "before and after were measured on other problems, and are not to be compared")


def _show(console: Console, name: str, value: str) -> None:
    console.print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
