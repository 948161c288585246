"""The likelihood of texts under several models as a table, and their calibration as a plot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from alignlab.evaluation.likelihood.measure import Interval, Reliability, TextLikelihood
from alignlab.files.atomic_files import replacing

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def likelihood_table(measured: Mapping[str, TextLikelihood]) -> Table:
    """Return a table of one row a model, with each figure's interval under it.

    Args:
        measured: by the name of the model.
    """
    first = next(iter(measured.values()))
    caption = (
        f"Under a figure: its 95 % interval, by resampling {first.resampled}. Perplexity by token depends on the "
        "tokenizer; by word and by byte it does not. ECE: calibration error of the likeliest next token; with "
        "temperature T, fitted on the held-out texts."
    )
    table = Table(
        title=f"{first.num_texts} texts, {first.num_words} words, {first.num_bytes} bytes", caption=Text(caption),
        title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD,
    )
    table.add_column("model", overflow="fold", min_width=8)
    columns = ["tokens", "by token", "by word", "by byte", "bits/byte", "ECE"]
    if first.temperature is not None:
        columns += ["T", "by token, T", "ECE, T"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for name, result in measured.items():
        figures = (result.token, result.word, result.byte, result.bits_per_byte, result.reliability.error)
        cells = [str(result.num_tokens), *map(_cell, figures)]
        if result.temperature is not None and result.tempered is not None and result.tempered_token is not None:
            cells += [f"{result.temperature:.3f}", _cell(result.tempered_token), _cell(result.tempered.error)]
        table.add_row(Text(name), *cells)
    return table


def _cell(figure: Interval) -> str:
    return f"{figure.value:.4g}\n{figure.low:.4g}..{figure.high:.4g}"


def plot_reliability(measured: Mapping[str, TextLikelihood], png: Path) -> None:
    """Draw the reliability diagrams: rate of being right over confidence; dashed with the temperature."""
    # Not pyplot, which has global state and may open a window.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
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
    with replacing(png) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
