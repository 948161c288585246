"""Tables for the console: results before and after a training, and completions side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignlab.evaluation.held_out_intervals import intervals_of
from alignlab.evaluation.results import (
    EvaluatedProblem,
    Evaluation,
    EvaluationResult,
    LabelResult,
    LikelihoodResult,
    PreferenceResult,
)

NUM_EXAMPLES = 4
MAX_SHOWN_CHARS = 300
_LABELS: dict[type[Evaluation], dict[str, str]] = {
    EvaluationResult: {
        "greedy": "extracted answer right, greedy",
        "sampled": "extracted answer right, sampled",
        "strict_greedy": "answer and nothing else, greedy",
        "strict_sampled": "answer and nothing else, sampled",
    },
    PreferenceResult: {
        "accuracy": "chosen leads",
        "margin": "margin",
        "loss": "loss",
        "calibration_error": "calibration error",
        "brier": "Brier score",
    },
    LabelResult: {"accuracy": "label agreed with", "margin": "margin", "loss": "loss"},
    LikelihoodResult: {"loss": "loss per token", "perplexity": "perplexity"},
}
"""By kind of result, the fields that a table shows and how they are called there."""


def show_table(title: str, lines: Sequence[tuple[str, Any]]) -> None:
    """Show names and values on stderr."""
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in lines:
        table.add_row(name, str(value))
    Console(stderr=True).print(table)


def change_table(before: Evaluation, after: Evaluation, *, title: str = "") -> Table:
    """Return a table of two results of the same kind with their 95 % intervals, and their difference."""
    assert type(before) is type(after)
    data = _describe_data(before)
    table = Table(
        title=f"{title}: {data}" if title else data, title_justify="left", caption="beside a figure: its 95 % interval",
        caption_justify="left",
    )
    table.add_column("accuracy" if isinstance(before, EvaluationResult) else "")
    for column in ("before", "after", "change"):
        table.add_column(column, justify="right", no_wrap=True)
    bounds = intervals_of(before), intervals_of(after)
    for name, label, old, new in _rows(before, after):
        if old is not None and new is not None:
            cells = [_figure(value, of_result.get(name)) for value, of_result in zip((old, new), bounds, strict=True)]
            table.add_row(label, *cells, f"{new - old:+.3f}")
    return table


def _figure(value: float, bounds: tuple[float, float] | None) -> str:
    """Return a figure with its interval, if it has one."""
    return f"{value:.3f}" + ("" if bounds is None else f"  {bounds[0]:.2f}..{bounds[1]:.2f}")


def _describe_data(result: Evaluation) -> str:
    """Return what a result was measured on, in a few words."""
    if isinstance(result, EvaluationResult):
        return f"{describe_judged(result)} held-out problems, {result.num_samples} samples each"
    if isinstance(result, PreferenceResult):
        return f"{result.num_pairs} held-out pairs"
    if isinstance(result, LabelResult):
        return f"{result.num_completions} held-out completions"
    return f"{result.num_examples} held-out examples"


def _rows(before: Evaluation, after: Evaluation) -> Iterator[tuple[str, str, float | None, float | None]]:
    """Yield name, label and both values of each figure."""
    for name, label in _LABELS[type(before)].items():
        yield name, label, getattr(before, name), getattr(after, name)
    if isinstance(before, EvaluationResult) and isinstance(after, EvaluationResult):
        for k in before.pass_at:
            if k > 1:  # pass@1 is the sampled accuracy
                yield f"pass@{k}", f"pass@{k}", before.pass_at[k], after.pass_at.get(k)


def examples_table(before: Sequence[EvaluatedProblem], after: Sequence[EvaluatedProblem]) -> Table:
    """Return a table of greedy completions before and after; the problems are evenly spaced and not picked."""
    rows = spaced_indices(min(len(before), len(after)), NUM_EXAMPLES)
    title = "greedy completions of the same problems"
    return completions_table({"before": before, "after": after}, rows, title=title)


def completions_table(
    policies: Mapping[str, Sequence[EvaluatedProblem]], rows: Sequence[int], *, title: str
) -> Table:
    """Return a table of several policies' greedy completions of the same problems, side by side.

    Args:
        policies: by the name of a column, all problems with one policy's completions.
        rows: indices of the problems to show.
        title: title of the table.
    """
    table = Table(title=title, title_justify="left", show_lines=True)
    for column, ratio in (("problem", 3), ("answer", 1), *((name, 3) for name in policies)):
        table.add_column(Text(column), ratio=ratio, overflow="fold")
    for i in rows:
        problems = [of_policy[i] for of_policy in policies.values()]
        first = problems[0]
        assert all(problem.prompt == first.prompt for problem in problems), "all are of the same problems"
        table.add_row(Text(_clipped(first.prompt)), Text(first.answer or ""), *map(_completion, problems))
    return table


def spaced_indices(size: int, count: int) -> list[int]:
    """Return at most `count` indices below `size`, evenly spaced from the first."""
    count = min(size, count)
    return [i * size // count for i in range(count)]


def describe_judged(result: EvaluationResult) -> str:
    """Return how many problems the accuracy is about, "J of N" where the scorer does not apply to all."""
    judged, total = result.judged, result.num_problems
    return str(total) if judged == total else f"{judged} of {total}"


def _completion(problem: EvaluatedProblem) -> Text:
    """Return a greedy completion, marked as right, wrong or not judged."""
    if problem.greedy_correct is None:
        return Text("not judged: ").append(_clipped(problem.greedy))
    mark, style = ("right", "green") if problem.greedy_correct else ("wrong", "red")
    return Text(f"{mark}: ", style=style).append(_clipped(problem.greedy), style="default")


def _clipped(text: str) -> str:
    text = text.strip()
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]} ..."
