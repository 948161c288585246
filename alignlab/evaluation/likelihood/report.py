"""The likelihood of texts under several models as a table, and their calibration as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from alignlab.evaluation.drawing import new_figure, save_figure
from alignlab.evaluation.likelihood.measure import Interval, Reliability, TextLikelihood, difference

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def likelihood_table(measured: Mapping[str, TextLikelihood]) -> Table:
    """Return a table of one column a model, with each figure's interval.

    Args:
        measured: by the name of the model.
    """
    results = list(measured.values())
    first = results[0]
    caption = (
        f"Beside a figure: its 95 % interval, by resampling {first.resampled}. Perplexity by token depends on the "
        "tokenizer; by word and by byte it does not. Calibration error: of the likeliest next token."
    )
    table = Table(
        title=f"{first.num_texts} texts, {first.num_words} words, {first.num_bytes} bytes", caption=Text(caption),
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
    )
    table.add_column("")
    for name in measured:
        table.add_column(Text(name, overflow="fold"), justify="right")
    table.add_row("tokens", *(str(result.num_tokens) for result in results))
    columns = [_figures(result, first, next(iter(measured))) for result in results]
    for row in columns[0]:
        figures = [column[row] for column in columns]
        if any(figure is not None for figure in figures):
            table.add_row(Text(row), *map(_cell, figures))
    if first.temperature is not None:
        table.add_row("temperature", *(f"{result.temperature:.3f}" for result in results))
    return table


def _figures(result: TextLikelihood, first: TextLikelihood, first_name: str) -> dict[str, Interval | None]:
    """Return the figures of a model by the name of their row; None for those that it has not."""
    figures: dict[str, Interval | None] = {
        "perplexity by token": result.token, "perplexity by word": result.word, "perplexity by byte": result.byte,
        "bits a byte": result.bits_per_byte, f"  less those of {first_name}": difference(first, result),
        "calibration error": result.reliability.error,
    }  # fmt: skip
    if first.temperature is not None:
        figures["with the temperature: by token"] = result.tempered_token
        figures["  calibration error"] = None if result.tempered is None else result.tempered.error
    return figures


def _cell(figure: Interval | None) -> str:
    if figure is None:
        return ""
    return f"{figure.value:.4g}" + ("" if math.isnan(figure.low) else f"  {figure.low:.4g}..{figure.high:.4g}")


def plot_reliability(measured: Mapping[str, TextLikelihood], png: Path) -> None:
    """Draw the reliability diagrams: rate of being right over confidence; dashed with the temperature."""
    figure = new_figure(6.4, 5.6)
    axis = figure.add_subplot()
    axis.plot((0, 1), (0, 1), color="black", linewidth=1, linestyle=":", label="calibrated")
    for number, (name, result) in enumerate(measured.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        lines: list[tuple[str, Reliability | None, str]] = [
            (name, result.reliability, "-"),
            (f"{name}, T = {result.temperature or 1:.2f}", result.tempered, "--"),
        ]
        for label, reliability, style in lines:
            if reliability is not None:
                bins = [of_bin for of_bin in reliability.bins if of_bin.size]
                axis.plot(
                    [of_bin.confidence for of_bin in bins], [of_bin.right for of_bin in bins], style, marker=".",
                    color=colour, label=f"{label}: ECE {reliability.error.value:.3f}",
                )
    axis.set(xlabel="probability of the likeliest next token", ylabel="rate of being right", xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="best")
    save_figure(figure, png)
