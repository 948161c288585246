"""Figures, drawn to PNG files that are whole or absent."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from alignlab.files.atomic_files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches; not by pyplot, which has global state and may open a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, png: Path) -> None:
    """Write a figure, in place of an earlier file."""
    with replacing(png) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
