"""The closing report: accuracy before and after, what was said before and after, curves, how to use the result."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignlab.atomic_files import write_atomically
from alignlab.training.curves import plot_curves
from alignlab.training.evaluation import (
    EvaluatedProblem,
    Evaluation,
    EvaluationResult,
    LabelResult,
    LikelihoodResult,
    PreferenceResult,
)
from alignlab.training.learning_signal import Verdict
from alignlab.training.run_folder import RunFolder

logger = logging.getLogger(__name__)
NUM_EXAMPLES = 4
MAX_SHOWN_CHARS = 300
MEASURES = {
    "greedy": "extracted answer right, greedy",
    "sampled": "extracted answer right, sampled",
    "strict_greedy": "answer and nothing else, greedy",
    "strict_sampled": "answer and nothing else, sampled",
}

PREFERENCE_MEASURES = {
    "accuracy": "chosen leads",
    "margin": "margin",
    "loss": "loss",
    "calibration_error": "calibration error",
    "brier": "Brier score",
}


@dataclass(frozen=True)
class RunReport:
    """What a run has to say at its end.

    Attributes:
        title: the run's name, such as its task.
        before, after: held-out accuracy before and after the training; None where there is no held-out data.
        train_seconds: spent in steps.
        num_steps: done.
        adapter: folder of the saved adapter; None where all weights were trained.
        model: folder of the saved model; None where an adapter was trained.
        base_model: what the adapter belongs on.
        generate_options: of `alignlab generate`, so that it renders a prompt as the training did: --system-prompt TEXT,
            --prompt-template TEXT, --plain.
        use: how the result is used, where that is not by `alignlab generate`.
        summary: more entries for report.json.
        verdict: whether anything was learnt, and why not.
        run_id: of the run, see `RunFolder`.
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
    use: str | None = None
    summary: Mapping[str, Any] = field(default_factory=dict)
    verdict: Verdict = field(default_factory=Verdict)
    run_id: str | None = None

    @property
    def command(self) -> str | None:
        """The command that tries the trained model, greedily, on the first held-out problem; or what `use` says."""
        if self.use is not None:
            return self.use
        answered = self.after.samples if isinstance(self.after, EvaluationResult) else ()
        problem = answered[0].prompt if answered else "Hello"
        if self.adapter is not None and self.base_model is not None:
            policy = [self.base_model, problem, "--adapter", str(self.adapter)]
        elif self.model is not None:
            policy = [str(self.model), problem]
        else:
            return None
        return shlex.join(["alignlab", "generate", *policy, *self.generate_options, "--temperature", "0"])

    def to_json(self) -> dict[str, Any]:
        """What report.json holds."""
        return {
            "run": self.run_id,
            "title": self.title,
            "num_steps": self.num_steps,
            "train_seconds": self.train_seconds,
            "before": None if self.before is None else self.before.to_json(),
            "after": None if self.after is None else self.after.to_json(),
            "adapter": None if self.adapter is None else str(self.adapter),
            "model": None if self.model is None else str(self.model),
            "base_model": self.base_model,
            "command": self.command,
            **self.verdict.to_json(),
            **self.summary,
        }


def write_report(run: RunFolder, report: RunReport, *, console: Console | None = None) -> None:
    """Write report.json and curves.png, and show the report on stderr."""
    console = console or Console(stderr=True)
    evaluations = {
        step: result.metrics()
        for step, result in ((0, report.before), (report.num_steps, report.after))
        if result is not None
    }
    write_atomically(run.report_file, json.dumps(report.to_json(), indent=1) + "\n")
    drawn = _draw_curves(run, report.title, evaluations)
    _show_evaluations(console, report)
    _show(console, "trained", f"{report.num_steps} steps in {report.train_seconds:.0f} s")
    if drawn:
        _show(console, "curves", str(run.curves_file))
    for name, path in (("adapter", report.adapter), ("model", report.model)):
        if path is not None:
            _show(console, name, str(path))
    for text in report.verdict.warnings:
        _show(console, "warning", text)
    if report.verdict.reason is not None:
        _show(console, "no success", report.verdict.reason)
    if report.command is not None:
        _show(console, "use it", report.command)


def show_table(title: str, lines: Sequence[tuple[str, Any]]) -> None:
    """Show names and values on stderr."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in lines:
        table.add_row(name, str(value))
    Console(stderr=True).print(table)


def _draw_curves(run: RunFolder, title: str, evaluations: Mapping[int, Mapping[str, float]]) -> bool:
    """Draw the curves, if there is anything to draw; a picture that cannot be drawn is said, and ends no run."""
    if not run.metrics_file.exists():
        return False  # a run of several stages has its metrics in theirs
    try:
        return plot_curves(run.metrics_file, run.curves_file, title=title, evaluations=evaluations)
    except Exception as error:
        logger.warning(
            "the curves could not be drawn (%s: %s); %s has their values",
            type(error).__name__, error, run.metrics_file,
        )  # fmt: skip
        return False


def _show_evaluations(console: Console, report: RunReport) -> None:
    before, after = report.before, report.after
    if isinstance(before, EvaluationResult) and isinstance(after, EvaluationResult):
        console.print(accuracy_table(before, after, title=report.title))
        if [each.prompt for each in before.samples] == [each.prompt for each in after.samples]:
            console.print(examples_table(before.samples, after.samples))
        else:  # a run of an earlier version could go on with other data
            _show(console, "warning", "before and after were measured on other problems, and are not to be compared")
    elif isinstance(before, PreferenceResult) and isinstance(after, PreferenceResult):
        console.print(preference_table(before, after, title=report.title))
    elif isinstance(before, LabelResult) and isinstance(after, LabelResult):
        console.print(label_table(before, after, title=report.title))
    elif isinstance(before, LikelihoodResult) and isinstance(after, LikelihoodResult):
        console.print(likelihood_table(before, after, title=report.title))


def preference_table(before: PreferenceResult, after: PreferenceResult, *, title: str = "") -> Table:
    """What the held-out preferences came to, before and after."""
    return _change_table(before, after, PREFERENCE_MEASURES, title=f"{title}: {before.num_pairs} held-out pairs")


def label_table(before: LabelResult, after: LabelResult, *, title: str = "") -> Table:
    """What the held-out completions came to that are labelled good or bad, before and after."""
    measures = {"accuracy": "label agreed with", "margin": "margin", "loss": "loss"}
    return _change_table(before, after, measures, title=f"{title}: {before.num_completions} held-out completions")


def likelihood_table(before: LikelihoodResult, after: LikelihoodResult, *, title: str = "") -> Table:
    """How likely the held-out completions are, before and after."""
    measures = {"loss": "loss per token", "perplexity": "perplexity"}
    return _change_table(before, after, measures, title=f"{title}: {before.num_examples} held-out examples")


def _change_table(before: Any, after: Any, measures: Mapping[str, str], *, title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="right" if column else "left")
    for name, label in measures.items():
        old, new = getattr(before, name), getattr(after, name)
        if old is not None and new is not None:
            table.add_row(label, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
    return table


def accuracy_table(before: EvaluationResult, after: EvaluationResult, *, title: str = "") -> Table:
    """Accuracy on the held-out problems, before and after."""
    samples = f"{problems_judged(before)} held-out problems, {before.num_samples} samples each"
    table = Table(title=f"{title}: {samples}" if title else samples, title_justify="left")
    table.add_column("accuracy")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right")
    rows = [(label, getattr(before, name), getattr(after, name)) for name, label in MEASURES.items()]
    rows += [(f"pass@{k}", before.pass_at[k], after.pass_at[k]) for k in before.pass_at if k > 1 and k in after.pass_at]
    for label, old, new in rows:
        if old is not None and new is not None:
            table.add_row(label, f"{old:.3f}", f"{new:.3f}", f"{new - old:+.3f}")
    return table


def examples_table(before: Sequence[EvaluatedProblem], after: Sequence[EvaluatedProblem]) -> Table:
    """Greedy completions of the same problems before and after: four, evenly spaced over all, not picked."""
    rows = evenly_spaced(min(len(before), len(after)), NUM_EXAMPLES)
    title = "greedy completions of the same problems"
    return completions_table({"before": before, "after": after}, rows, title=title)


def completions_table(
    answered: Mapping[str, Sequence[EvaluatedProblem]], rows: Sequence[int], *, title: str
) -> Table:
    """Greedy completions of the same problems side by side.

    Args:
        answered: by the column's name, all problems with what one policy said.
        rows: which of the problems to show.
    """
    table = Table(title=title, title_justify="left", show_lines=True)
    for column, ratio in (("problem", 3), ("answer", 1), *((name, 3) for name in answered)):
        table.add_column(Text(column), ratio=ratio, overflow="fold")
    for i in rows:
        first, *others = (problems[i] for problems in answered.values())
        assert all(other.prompt == first.prompt for other in others), "all are of the same problems"
        verdicts = [_verdict(each) for each in (first, *others)]
        table.add_row(Text(_cut(first.prompt)), Text(first.answer or ""), *verdicts)
    return table


def evenly_spaced(size: int, count: int) -> list[int]:
    """At most `count` indices below `size`, evenly spaced from the first."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


def problems_judged(result: EvaluationResult) -> str:
    """How many problems the accuracy is of, and of how many, where the scorer did not apply to all."""
    judged, total = result.judged, result.num_problems
    return str(total) if judged == total else f"{judged} of {total}"


def _verdict(problem: EvaluatedProblem) -> Text:
    if problem.greedy_correct is None:
        return Text("not judged: ").append(_cut(problem.greedy))
    mark, style = ("right", "green") if problem.greedy_correct else ("wrong", "red")
    return Text(f"{mark}: ", style=style).append(_cut(problem.greedy), style="default")


def _cut(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]} ..."


def _show(console: Console, name: str, value: str) -> None:
    console.print(f"{name}: {value}", soft_wrap=True, highlight=False, markup=False)
