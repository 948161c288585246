"""Curves of a run, drawn from its metrics file to a PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignlab.evaluation.drawing import new_figure, save_figure
from alignlab.runs.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXPERT_LOAD = "expert_load/"
EVALUATED = {"eval/greedy": ("held out, greedy", "o"), "eval/sampled": ("held out, sampled", "s")}
ACCURACY = "accuracy"
MAX_COLUMNS = 3
SMOOTHING = 10
"""The running mean is over the number of steps divided by this."""


@dataclass(frozen=True)
class Panel:
    """One curve: its metric, its title, the label of its vertical axis."""

    metric: str
    title: str
    label: str


PANELS = (
    Panel("reward", "Reward", "mean reward"),
    Panel(ACCURACY, "Accuracy", "fraction right"),
    Panel("kl", "KL to the reference", "nats / token"),
    Panel("completion_tokens", "Completion length", "tokens"),
    Panel("entropy", "Entropy", "nats / token"),
    Panel("loss", "Loss", "loss"),
    Panel("grad_norm", "Gradient norm", "norm before clipping"),
)


def plot_curves(
    metrics_file: Path,
    png: Path,
    *,
    title: str = "",
    evaluations: Mapping[int, Mapping[str, float]] | None = None,
) -> bool:
    """Draw the metrics that have a panel, as raw values and their running mean.

    Args:
        metrics_file: the run's metrics.
        png: the file to write.
        title: title of the figure.
        evaluations: by step, held-out metrics (`eval/greedy`, `eval/sampled`) beside those in the file.

    Returns:
        Whether there was anything to draw.
    """
    lines = read_metrics(metrics_file)
    lines += [{"step": step, **metrics} for step, metrics in (evaluations or {}).items()]
    panels = [panel for panel in PANELS if any(_series(lines, metric)[0] for metric in _metrics_of(panel))]
    loads = expert_loads(lines)
    count = len(panels) + bool(loads)
    if count == 0:
        return False
    columns = min(MAX_COLUMNS, count)
    rows = -(-count // columns)
    figure = new_figure(4.8 * columns, 3.4 * rows)
    if title:
        figure.suptitle(title, fontsize=14)
    axes = [figure.add_subplot(rows, columns, i + 1) for i in range(count)]
    for panel, axis in zip(panels, axes, strict=False):
        _draw(axis, panel, lines)
    if loads:
        _draw_loads(axes[-1], loads)
    save_figure(figure, png)
    return True


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean of each value and the up to `window - 1` values before it."""
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(window, i + 1) for i in range(len(values))]


def expert_loads(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each expert's latest fraction of the router's choices, by the metric's name without `expert_load/`."""
    loads: dict[str, float] = {}
    for line in lines:
        loads |= {
            k.removeprefix(EXPERT_LOAD): v for k, v in line.items() if k.startswith(EXPERT_LOAD) and v is not None
        }
    return loads


def _metrics_of(panel: Panel) -> tuple[str, ...]:
    return (panel.metric, *EVALUATED) if panel.metric == ACCURACY else (panel.metric,)


def _series(lines: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[int], list[float]]:
    """Return the steps and the finite values of a metric, in the order of steps."""
    points = sorted((line["step"], line[metric]) for line in lines if line.get(metric) is not None)
    return [step for step, _ in points], [value for _, value in points]


def _draw(axis: Axes, panel: Panel, lines: Sequence[Mapping[str, Any]]) -> None:
    """Draw one panel."""
    steps, values = _series(lines, panel.metric)
    if values:
        window = max(1, len(values) // SMOOTHING)
        label = "training rollouts" if panel.metric == ACCURACY else "training"
        mean_label = f"{label}, mean of {window} steps" if window > 1 else label
        axis.plot(steps, values, color="tab:blue", alpha=0.3, linewidth=1, marker="." if len(steps) < 3 else None)
        axis.plot(steps, running_mean(values, window), color="tab:blue", linewidth=2, label=mean_label)
    if panel.metric == ACCURACY:
        for i, (metric, (label, marker)) in enumerate(EVALUATED.items()):
            at, accuracy = _series(lines, metric)
            if at:
                axis.plot(at, accuracy, marker, color=("tab:red", "tab:orange")[i], markersize=7, label=label)
        axis.set_ylim(-0.03, 1.03)
    axis.legend(fontsize=8, loc="best")
    axis.set_title(panel.title)
    axis.set_xlabel("step")
    axis.set_ylabel(panel.label)
    axis.grid(alpha=0.3)


def _draw_loads(axis: Axes, loads: Mapping[str, float]) -> None:
    """Draw the experts' loads as bars."""
    names = list(loads)
    # Names are "expert" or "layer/expert"; an even share is one over the experts of a layer.
    layers = {name.rpartition("/")[0] for name in names}
    axis.bar(range(len(names)), list(loads.values()), color="tab:green")
    axis.axhline(len(layers) / len(names), color="black", linewidth=1, linestyle="--", label="even share")
    stride = -(-len(names) // 16)
    axis.set_xticks(range(0, len(names), stride), names[::stride], fontsize=8)
    axis.legend(fontsize=8, loc="best")
    axis.set_title("Expert load at the last step")
    axis.set_xlabel("expert")
    axis.set_ylabel("fraction of choices")
