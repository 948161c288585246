"""Strategies as a table, and as a plot over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from alignlab.evaluation.drawing import new_figure, save_figure
from alignlab.evaluation.strategies.figures import Figure
from alignlab.evaluation.strategies.measured import MeasuredStrategies
from alignlab.evaluation.strategies.voting import ORACLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_WIDTH = 400
_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink", "tab:olive")
_STYLES = ("-", "--", ":", "-.")


def show_strategies(console: Console, measured: Sequence[MeasuredStrategies]) -> None:
    """Show the table; widen a console that is too narrow for its numbers."""
    table = strategies_table(measured)
    needed = Measurement.get(console, console.options.update(max_width=MAX_WIDTH), table).minimum
    console.width = max(console.width, needed)
    console.print(table)
    for of_model in measured:
        for calibration in of_model.calibrations:
            before, after = calibration.before, calibration.after
            console.print(
                f"{of_model.name}: share of votes as a confidence: temperature {calibration.temperature:.3g} from "
                f"{calibration.num_fitted} problems; calibration error on {calibration.num_measured} others "
                f"{before.value:.3f} ({before.low:.3f}..{before.high:.3f}) before, {after.value:.3f} "
                f"({after.low:.3f}..{after.high:.3f}) after",
                soft_wrap=True, highlight=False, markup=False,
            )  # fmt: skip


def strategies_table(measured: Sequence[MeasuredStrategies]) -> Table:
    """Return a table of one row a figure."""
    first = measured[0].problems
    caption = (
        "k: samples of a problem (budget: tokens of thinking). Interval: 95 %, over problems. tokens: sampled, a "
        "problem. oracle: pass@k. +-: standard error of a figure from random subsets of the pool; without it the "
        "figure is exact."
    )
    table = Table(
        title=f"{len(first)} problems, a pool of {first[0].num_samples} samples each", caption=Text(caption),
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
    )
    table.add_column("model", overflow="fold", min_width=8)
    table.add_column("strategy", no_wrap=True)
    for column in ("k", "accuracy", "interval", "tokens", "+-"):
        table.add_column(column, justify="right", no_wrap=True)
    for of_model in measured:
        name, strategy = of_model.name, ""
        for figure in of_model.figures:
            table.add_row(
                Text(name), Text("" if figure.strategy == strategy else figure.strategy), *_numbers(figure)
            )
            name, strategy = "", figure.strategy
    return table


def _numbers(figure: Figure) -> list[str]:
    low, high = figure.interval
    return [
        str(figure.k), f"{figure.accuracy:.3f}", f"{low:.2f}..{high:.2f}", f"{figure.tokens:.1f}",
        f"{figure.error:.3f}" if figure.error else "",
    ]  # fmt: skip


def plot_strategies(measured: Sequence[MeasuredStrategies], png: Path, *, title: str = "") -> None:
    """Draw accuracy over tokens: a colour a strategy, a line style a model, the oracle in black."""
    drawing = new_figure(10, 5.2)
    axis = drawing.add_subplot()
    names = list(dict.fromkeys(figure.strategy for of_model in measured for figure in of_model.figures))
    colours = dict(zip((name for name in names if name != ORACLE), _COLOURS * len(names), strict=False))
    for number, of_model in enumerate(measured):
        for strategy in dict.fromkeys(figure.strategy for figure in of_model.figures):
            label = strategy if len(measured) == 1 else f"{of_model.name}: {strategy}"
            style, colour = _STYLES[number % len(_STYLES)], colours.get(strategy, "black")
            _draw_line(axis, of_model.of(strategy), label=label, fmt=style, color=colour)
    axis.set_xscale("log", base=2)
    axis.set(xlabel="sampled tokens a problem", ylabel="fraction right, 95 % interval", ylim=(-0.02, 1.02), title=title)
    axis.grid(alpha=0.3)
    drawing.legend(fontsize=8, loc="outside right upper")
    save_figure(drawing, png)


def _draw_line(axis: Axes, figures: Sequence[Figure], **look: Any) -> None:
    """Draw accuracies over tokens with their intervals."""
    figures = sorted(figures, key=lambda figure: figure.tokens)
    below = [max(0.0, figure.accuracy - figure.interval[0]) for figure in figures]
    above = [max(0.0, figure.interval[1] - figure.accuracy) for figure in figures]
    tokens, heights = [figure.tokens for figure in figures], [figure.accuracy for figure in figures]
    bars: Any = axis.errorbar(tokens, heights, yerr=(below, above), marker=".", elinewidth=0.8, capsize=2, **look)
    for bar in (*bars.lines[1], *bars.lines[2]):
        bar.set_alpha(0.4)
